"""Describes what a job costs: GPU-seconds, waiting, energy, money.

prices.py   an administrator's prices of GPUs, and the one that a job pays
energy.py   how much energy a report is believed
usage.py    what a job has used, as its status says it
"""
