"""Attention by kernels of others, each behind the same functions, without a gradient of its own.

flash.py        FlashAttention: sequences of any lengths, and windows
batched.py      cuDNN's for sequences of one length, by PyTorch's call
ragged.py       cuDNN's for sequences of mixed lengths, by NVIDIA's package for cuDNN's graphs
ragged_plan.py  what that is compiled for
cudnn_cards.py  cards on which cuDNN's is used
efficient.py    PyTorch's memory-efficient kernel: cards before Ampere, heads of more than 256 elements
cpu.py          the CPU's
halves.py       more sequences than one call takes
"""
