"""Layers of one model that differ, as metadata.

experts.py       numbers of experts, and layers without
first_layers.py  sparse MLPs and keys of the first layers alone
kinds.py         kinds of layers, and what else config.json says of those that keep a state
layer_sizes.py   sizes that differ between full and windowed layers
"""
