"""Manifests of the objects that a FineTuneJob should have, built without clock, cluster or environment.

`installation`    what the operator's installation says to every job: images, addresses, limits
`names`           names, labels and owner references of the children
`pod_plan`        which pod is meant (trainer or preflight), its claims and its credentials
`pod_options`     what `spec.pod` adds: identity, registries, proxies, authorities, a cache, places
`peers`           the Service and the NetworkPolicy of a job on several nodes
`trainer_pod`     the spec of that pod
`trainer_job`     the batch/v1 Job that trains, and what both Jobs have in common
`job_set`         the JobSet that makes the trainer's Job, for clusters that manage JobSets
`preflight_job`   the batch/v1 Job that checks model, data and output on a CPU
`run_config_map`  the immutable ConfigMap with the run's configuration, which a Job's pods mount
"""
