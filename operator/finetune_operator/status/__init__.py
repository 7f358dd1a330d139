"""Builds the status of a job, and the Events that tell its story, from a snapshot and the decision about it. Pure.

`status`      the whole status
`conditions`  the nine conditions, kstatus among them
`validated`   the condition Validated
`attempts`    the pods of a run, remembered after they are gone
`progress`    step, loss and percentage, from reports and outcomes
`usage`       GPU time, waiting and cost
`energy`      energy of the pods' GPUs, as far as it is believed
`preflight`   what preflight found
`events`      one Event for each transition between two statuses
"""
