"""Receives the progress reports of trainers.

`server`   the HTTPS endpoint and its certificate
`forward`  passes the reports that reach a follower on to the leader
`checks`   every check that a report must pass
"""
