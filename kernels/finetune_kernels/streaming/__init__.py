"""Frozen weights of decoder layers that are on the GPU only while they are used, and come a layer ahead.

frozen_tensors.py   the tensors of a layer's NF4 weights
flat_layout.py      a layer's tensors one after the other in one buffer
sharded_tensors.py  a layer of which each rank keeps a part: an all-gather brings the others'
host_tensors.py     a layer that waits in pinned host memory: a copy brings it
layer_window.py     which layers are whole, and when the next one is brought
host_layers.py      a model's first layers in host memory, as many as its memory plan says
"""
