"""A run on several nodes: one pod a node, which meet at the first one and end together.

place.py      the place of this pod among those of the run (pure)
reach.py      the way to the first pod: its name, its address, and what keeps others from it
meeting.py    all pods are there; each hears when another fails, is lost, or has done its part
same_rows.py  every pod prepares its own model and rows, which must be those of the first

Torchrun's c10d store is what they meet at. A run on one node opens none of it.
"""
