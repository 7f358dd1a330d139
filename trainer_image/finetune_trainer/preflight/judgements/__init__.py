"""Judges what preflight has counted: turns it into errors and warnings. Pure.

rows.py            bad rows, duplicates, lengths, and how answers end
reasoning.py       reasoning that the chat template leaves out or doubles
messages.py        keys of messages that nothing reads, calls that no tool declares
new_tokens.py      new tokens that nothing uses
unknown_tokens.py  rows that the tokenizer does not know
batching.py        documents that cannot be packed, and what that costs
coverage.py        weights without an adapter, or that NF4 leaves in 16 bits
dropout.py         dropout of the base model itself, which is switched off
disk.py            files that the job will write, against the disk that it asks for
training.py        steps, epochs, learning rate, and rows that also evaluate
export.py          GGUF files that could not be made
"""
