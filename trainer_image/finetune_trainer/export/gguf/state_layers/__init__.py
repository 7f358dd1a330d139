"""Layers that keep a state instead of keys and values (linear attention, Mamba 2, short convolutions), as llama.cpp has
them.

kinds.py     what config.json says of the layers
metadata.py  the layers' kinds and sizes
tensors.py   changes of the tensors' values
"""
