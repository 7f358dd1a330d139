"""Ends of a trainer's pod, as trainer, operator and Job controller understand them alike.

exit_codes.py   the trainer's exit codes, and what the Job controller does after each
failure_reasons.py  names of failures, for machines
stalls.py       limits of a run that no longer gets on
"""
