"""Every console command: `finetune` on a user's machine, `finetune-trainer` in a pod.

finetune.py           `finetune`: its verbs, their options and examples
local_job.py          the verbs that take a job, with their options: init, run, validate
manifest/             the job of a local run: from a manifest, from options; `finetune init`
local_hints.py        what to do about a failure on one's own machine
machine.py            the user's machine, as far as it can be known without PyTorch
run.py                `finetune run`: a job on this machine, with a live view
local_result.py       a result in a folder: links to the newest, and the commands that come next
preflight.py          `finetune validate` and `finetune-trainer preflight`
export.py             `finetune export`: merge and convert, without training
export_arguments.py   the options of `finetune export`, all of whose errors are reported together
export_judging.py     the loss of every exported file, on rows that the user gives
artifacts.py          `finetune artifacts`: list or download a result
chat/                 `finetune chat`: a conversation with what a job made
compare/              `finetune compare`: two results side by side
find_result.py        where a job's result is, from what a user calls the job
cluster_job.py        a job as a cluster has it, for the verbs that also work without one
live/                 a run as its user sees it: a live view on a terminal, plain lines elsewhere
pod.py                `finetune-trainer run`: one attempt of a job in its pod
rank.py               one of the other processes of a run on several GPUs
"""
