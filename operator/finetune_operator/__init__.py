"""Watches FineTuneJobs, runs each as two batch/v1 Jobs (preflight, training), and answers in its status.

Begin with `reconcile`, the path of one job: it observes, decides, acts and answers. Then the folders, in that order:

`observe`   reads a job and its children into one snapshot
`decide`    chooses phase, reason and writes, by ordered rules (pure)
`desired`   builds the manifests of the children (pure)
`status`    builds the status and the Events (pure)
`cluster`   sends the requests to Kubernetes
`election`  elects the one replica that does all this
`watch`     turns kopf's events into jobs that are due
`reports`   receives the progress reports of trainers, and shows the metrics
`metrics`   counts what the operator does
`main`      builds all of this from `settings` and runs it; `health` answers the kubelet's probes

`installation_check` is what `helm test` runs.
`gpu_line` remembers who waits for GPUs of a namespace that has a limit.
`status_reasons` names every reason that is no failure, and `errors` is the tree of exceptions.
"""
