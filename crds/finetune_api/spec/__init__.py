"""`spec` of a FineTuneJob: what the user writes, one file a section.

inputs.py      model, dataset and evaluation data
training.py    adapter and training run
output.py      export, S3 and the Hugging Face Hub
endpoints.py   addresses that a trainer may connect to
location.py    where in the bucket a job writes
run.py         resources and run policy
scheduling.py  queue and scheduler
pod.py         what the job's pods carry: identity, labels, registries, proxies
pod_policy.py  which of it the administrator sets, and which a job may
sources.py     the four kinds of source URI
spec.py        FineTuneJobSpec: all sections, and the rules between them
"""
