"""Describes what a job costs: GPU-seconds, waiting, money.

prices.py   an administrator's prices of GPUs, and the one that a job pays
usage.py    what a job has used, as its status says it
"""
