"""Training on several GPUs, measured: `several_gpus.py` starts the processes.

cases.py        rows: model, processes, placement of the base, limit of a card; pure
random_base.py  a model of random weights, made in NF4 on each rank: of a sharded one, a layer at a time
rank.py         one process: trains the rows of its launch, and prints a line for each
                rows of one GPU whose weights stream from host memory need no launch: it runs them by itself
slow_network.py sums that wait as they would between nodes
exchange.py     time of a step that collectives take: all-reduce, gathers, waiting for the slowest rank
results.py      several_gpus.csv: the rows of each call
"""
