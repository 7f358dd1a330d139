"""Receives the progress reports of trainers.

`server`  the HTTPS endpoint and its certificate
`checks`  every check that a report must pass
"""
