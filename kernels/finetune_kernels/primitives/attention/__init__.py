"""Attention by its formula, and by kernels of others, each behind the same functions, without a gradient of its own.

inputs          q, k and v, packed sequences, and settings of scores, as values
reference       the formula, forward and backward
flash           FlashAttention: sequences of any lengths, and windows
flash4          FlashAttention 4 on Hopper, by its own package
batched         cuDNN's for sequences of one length, by PyTorch's call
pass_counts     passes by their shape: cuDNN takes those whose shape comes again
cudnn_cards     cards on which cuDNN's is used
efficient       PyTorch's memory-efficient kernel: cards before Ampere, heads of more than 256 elements
cpu             the CPU's
halves          more sequences than one call takes
"""
