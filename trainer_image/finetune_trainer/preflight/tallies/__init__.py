"""Tallies: what the scan counts while it reads rows, for the judgements. Pure.

rows.py       rows that have something in common, with examples
reasoning.py  what the chat template makes of the reasoning of answers
new_tokens.py which of the new tokens the rows use
messages.py   keys of messages that have no meaning, calls that no tool declares
"""
