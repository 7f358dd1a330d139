"""The job of `finetune run` and `finetune validate`: from a manifest, from options, or from both.

read.py       reads and validates the job; all errors together, each with its line or its option
options.py    the options that stand for fields: --model, --rank, --set ...
sources.py    org/name, relative paths and ~ as the URIs that a job holds
starter.py    a commented manifest to begin with
"""
