"""Sizes of the parts of a model that not every model has, or not in every layer, from its configuration.

expert_shape.py  a mixture's experts, and its layers that have an MLP in their place
latent_shape.py  latent attention
layer_sizes.py   heads, MLP and shared keys of single layers, where layers differ
mixer_shape.py   a hybrid's other mixer, and the packages with kernels for it
vocabulary.py    embedding and head
"""
