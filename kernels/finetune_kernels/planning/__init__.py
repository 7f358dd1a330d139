"""Decides what fits on a GPU, from numbers alone: imports no torch, so preflight plans before a GPU is asked for.

families.py           the model families that the kernels know, a row each; layers ask it as well
activation_policy.py  what a layer saves for its backward pass
block_sizes.py        rows that go through the loss and the MLP at once: kernels and plan must agree on them
model_shape.py        the sizes of a model that memory and time depend on, and their formulas
memory_plan.py        a policy for each layer, and whether dequantised weights are kept
micro_batch.py        sequences per pass
"""
