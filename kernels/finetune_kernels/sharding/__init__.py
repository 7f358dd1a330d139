"""Frozen weights that are shared out among the ranks of a run, and gathered layer by layer where they are used.

sharded_tensors.py  one layer's tensors: each rank's part, the all-gather, and the empty storage between two uses
layer_window.py     which layers are whole, and when the next one is gathered
"""
