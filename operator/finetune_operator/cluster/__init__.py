"""Requests to Kubernetes: the only folder that sends any.

cluster.py     every path and verb, as methods that take and return plain objects
connection.py  kubernetes.aio under a service account or a kubeconfig, with our errors
access.py      the rights that these requests need
generate.py    writes the chart's role from access.py
"""
