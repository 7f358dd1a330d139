"""Decides a job's phase, reason and next action from its snapshot. Pure: no clock, no cluster.

`decide`           the chains of rules, in order, and `decide` itself
`chain`            what a rule is, and the loop that asks one after the other
`decision`         the answer: phase, reason, message, and writes to child objects
`job_rules`        rules about the FineTuneJob itself: over, deleted, unreadable, in a denied namespace, a name taken
`preflight`        rules about preflight: passed, failed, suspended, missing
`training`         rules about training: succeeded, failed, missing
`shared`           rules for both runs: a deleted Job, pods that are left over, an outdated ConfigMap, running
`open_run`         the phase of a run that has neither succeeded nor failed, and the Job's fields that follow the spec
`gpu_time`         the GPU time that a job has taken, and what is left of it
`gpu_budget`       a job whose GPU time is too little, or spent
`waiting`          what a run waits for, in a queue and elsewhere, and how long it may
`silence`          for how long a trainer that runs has not reported
`stalls`           a run that stalls or diverges: one restart, then the end
`explain_failure`  why a run or one of its pods failed
"""
