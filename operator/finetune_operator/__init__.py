"""From manifest to pod: watches FineTuneJobs, runs each as a batch/v1 Job, and answers in its status.

Read in this order: `reconcile.py` (the main path), `observe.py`, `decide.py`, `desired/`, `status.py` and
`conditions.py` (all pure), `cluster.py` (the only Kubernetes I/O), `handlers.py` (the whole kopf surface),
`progress_server.py`, `main.py`.
"""
