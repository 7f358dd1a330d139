"""Judges what preflight has counted: turns it into errors and warnings. Pure.

rows.py      bad rows, duplicates, lengths, and how answers end
unknown_tokens.py  rows that the tokenizer does not know
coverage.py  weights without an adapter, or that NF4 leaves in 16 bits
training.py  steps, epochs, learning rate, and rows that also evaluate
"""
