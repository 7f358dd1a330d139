"""Batching: the arrangement of a forward pass's documents in which none sees another.

isolation.py        finds it, by computing two documents together and alone
cost.py             its cost for the rows of a run, in words
length_grouping.py  rows of like length beside each other, as a sampler for PyTorch's loader
"""
