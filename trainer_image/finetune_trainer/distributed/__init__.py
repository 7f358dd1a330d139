"""Data parallel training: the processes of one run, each with a whole model and its share of every step.

world.py     this process among the others, and what they exchange
shares.py    the rows of a step that each process takes (pure)
launched.py  joins the processes that torchrun has started

A run of one process is `world.ALONE`, for which nothing here does anything.
"""
