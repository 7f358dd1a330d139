"""Says what a run without a running trainer waits for, and how long it may.

`explain_waiting`  why there is none yet, in terms of what a person can do
`queue`            a run in a queue of Kueue: what it waits for there, and its suspension
`gpu_limit`        a run that waits for GPUs of its namespace's limit
`startup_deadline` a pod that waits too long for its start
"""
