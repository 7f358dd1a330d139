"""Formats the log lines of operator and trainer: for people or for machines, and without secrets in either.

redaction.py   what looks like a secret, and what stands there instead
formats.py     one line of text, or one object of JSON, for each record
"""
