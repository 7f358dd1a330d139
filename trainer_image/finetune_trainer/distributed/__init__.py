"""Data parallel training: the processes of one run, each with a whole model and its share of every step.

world.py        this process among the others, and what they exchange
shares.py       the rows of a step that each process takes (pure)
passes_together.py  forward passes in numbers of each rank's own, over a base of which every rank keeps a part
cards.py        the GPU of a process, chosen before CUDA starts
driver.py       NVIDIA's driver of the node, against what this installation needs
other_ranks.py  starts the other processes of a run, and ends with the first that fails
rank_ends.py    what a rank says of its failure, and what its exit code tells
group.py        the processes of one pod among those of the whole run
nodes/          a run on several nodes: its pods meet, and end together
launched.py     joins them, or those that torchrun has started

A run of one process is `world.ALONE`, for which nothing here does anything.
"""
