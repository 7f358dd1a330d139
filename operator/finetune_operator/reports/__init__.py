"""Receives the progress reports of trainers, and shows the metrics.

`site`     connections: how many, how long, and how large
`visits`   the open connections, and who has to leave
`tls_buffers`  what a connection holds in memory
`server`   the HTTPS endpoint
`certificate`  its certificate, and what happens when it is renewed
`own_certificate`  makes that certificate, where nobody else does, and the authority that every replica has
`published_authority`  shows that authority to Prometheus and to people
`forward`  passes the reports that reach a follower on to the leader
`checks`   every check that a report must pass
`callers`  the pod and the job that a token belongs to, looked up as rarely as possible
`self_check`  whether trainers can reach the server, as far as the operator can tell
`metrics_route`  who may read the metrics, and the metrics
`expiry`   when the certificate expires
`limits`   allowances and remembered answers, in bounded memory
"""
