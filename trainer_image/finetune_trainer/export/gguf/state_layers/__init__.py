"""Layers that keep a state instead of keys and values (linear attention, Mamba 2, short convolutions), as llama.cpp has
them.

metadata.py  the layers' kinds and sizes
scales.py    factors of config.json that llama.cpp has inside the weights
tensors.py   changes of the tensors' values
"""
