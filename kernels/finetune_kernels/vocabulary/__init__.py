"""Embedding and output head of a transformers model.

host_vocabulary.py   both in pinned host memory
trained_rows.py      the rows of new tokens, which train while all others are frozen
"""
