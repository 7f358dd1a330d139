"""Triton kernels and what is built of them: fused decoder layers with LoRA over frozen NF4 weights.

Each folder imports only those above it in this list:

    planning     memory plan, micro-batch, families and model shape (no torch)
    primitives   kernels without a gradient of their own
    ops          differentiable operations, each with the same five names
    vocabulary   embedding and head: in host memory, and the rows of new tokens that train
    mixers       hybrids' layers without attention: their modules run packed documents apart
    experts      the experts of a mixture, and their installation in a transformers model
    graphs       CUDA graphs of functions whose passes have one shape
    streaming    frozen weights that come a layer ahead, from the ranks or from host memory
    layers       whole decoder layers, and their installation in a transformers model
"""
