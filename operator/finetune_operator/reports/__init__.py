"""Progress reports of trainers: who may report, and where.

server.py  the HTTPS endpoint and its certificate
checks.py  every check that a report must pass
"""
