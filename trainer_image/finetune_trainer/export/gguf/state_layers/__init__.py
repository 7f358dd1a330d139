"""Layers that keep a state instead of keys and values (linear attention, short convolutions), as llama.cpp has them.

metadata.py  the layers' kinds and sizes
tensors.py   changes of the tensors' values
"""
