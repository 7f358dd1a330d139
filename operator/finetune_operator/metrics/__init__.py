"""Measures what the operator does, in Prometheus' text format.

`series`      every series that is counted as things happen, with its labels and what it means
`job_gauges`  series about the jobs that exist, made from memory when they are asked for
`job_ends`    counts what a status write says about stages, retries and ends
"""
