"""Sends the operator's requests to Kubernetes. No other folder sends any.

`cluster`       every path and verb, as methods that take and return plain objects
`queues`        requests about Kueue's objects
`status_writer` writes of a status, also under a CRD that is older than this operator
`peer_objects`  requests about the Service and the NetworkPolicy of a job on several nodes
`job_sets`      requests about JobSets
`requests`      what several of these need: reading what may not be there, changing what was read
`gpu_users`     requests about who holds a namespace's GPUs, or waits for them
`connection`    kubernetes.aio under a service account or a kubeconfig, with errors of our own tree
`scrapers`      who reads the metrics, and whether they may
`answers`       what is read from an answer, whoever gave it
`usable_answers` what kopf's session makes of answers that kopf cannot read
`server_clock`  the API server's clock, from its answers
`access`        the rights that these requests need
`generate`      writes the chart's role from `access`
"""
