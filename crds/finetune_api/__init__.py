"""The API: the FineTuneJob resource, and the two typed hand-overs between operator and trainer.

Read in this order:

    spec/            what a user writes, one file a section; spec.py puts the sections together
    status.py        what the operator answers
    run_config.py    operator to trainer: the resolved job, mounted into the pod
    progress.py      trainer to operator, while the job runs
    outcome.py       trainer to operator, at the end
    judgement.py     what published weights kept of the training; part of the outcome and of the manifest
    failures.py      the table of failure reasons, exit codes and hints that both sides share
    pod_ends/        exit codes and their consequences; when a run counts as stalled
    preflight.py     the summary of the checks before a GPU is requested
    cost/            prices of GPUs, and what a job has used
    logs/            what log lines look like, and how secrets are kept out of them
    vocabulary.py    every string that a machine compares
    job.py           the resource as a whole, and how a manifest is read
    explain.py       the errors of a manifest in words: one a line, with the nearest right word
    gpus.py          memory and speed of known GPUs
    base.py          the base class of all models; rules that CEL and Python share
    structural.py    pydantic's JSON schema -> a structural schema
    definition.py    the CustomResourceDefinition
    generate.py      writes the CRD and the chart's copy
"""

from typing import Final, Literal

GROUP: Final = "finetune.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final[Literal["finetune.dev/v1alpha1"]] = "finetune.dev/v1alpha1"
KIND: Final = "FineTuneJob"
PLURAL: Final = "finetunejobs"
