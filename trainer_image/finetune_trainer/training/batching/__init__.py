"""Batching: the arrangement of a forward pass's documents in which none sees another.

isolation.py        finds it, by computing two documents together and alone
trial.py            one small step, so that what cannot be trained has a reason
cost.py             its cost for the rows of a run, in words
length_grouping.py  rows of like length beside each other, as a sampler for PyTorch's loader
rank_share.py       one process's rows of every step
"""
