"""FineTuneJobs in a cluster, as their users see them: the verbs of `finetune` that need a kubeconfig and no PyTorch.

main.py        `kubectl finetune`: the same verbs as a plugin of kubectl
verb.py        one command: its help, its options, what carries it out
verbs.py       the table of commands, with their options and examples
connection.py  the cluster of a kubeconfig, by the official client: contexts, exec plugins, service accounts
errors.py      what the API server and the network refuse, in a sentence that says what to do; exit codes
terminal/      what a cluster says, as a terminal shows it: cleaned, in words, in lines and blocks
rows.py        one job as a row: phase, progress, loss, GPUs, queue
show.py        list, describe, estimate, top: what is read once
jobs.py        jobs from Python, as in a notebook: submit, follow, wait
watch.py       watch: bars and curves of many jobs, or plain lines
change.py      submit, suspend, resume, cancel
again.py       retry, and resume on other GPUs: the job is created again
artifacts.py   artifacts, as a job's status lists them
pods.py        logs and events
complete.py    names for the completion of bash, zsh, fish and kubectl
"""
