"""Reads the cluster into one frozen snapshot of a job, which everything pure works on.

`observe`          reads a job and its children, live
`snapshot`         the snapshot: what the pure functions know
`queue`            reads what Kueue says of the current run
`gpu_use`          who holds the GPUs of a namespace that has a limit, and who waits for them
`workload`         Kueue's Workload and a run's queue as small typed values (pure)
`blockers`         what keeps a pod from starting, by its Events
`leftovers`        what still runs under the job's name: orphaned pods, and a predecessor
`doubts`           why a pod's last word is not believed (pure)
`job_set`          the JobSet between a FineTuneJob and its Job as a small typed value (pure)
`children`         child Jobs and pods as small typed values
`termination`      the end of a trainer's container, and its last words
`several_pods`     the pods of a run on several nodes, told as those of one (pure)
`report_store`     the newest progress report of each job, in memory
`terminated_pods`  pods that have ended and may be gone before they can be read
"""
