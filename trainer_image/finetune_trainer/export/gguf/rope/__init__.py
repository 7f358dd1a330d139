"""RoPE in GGUF files: the base frequency, its dimensions and its scaling.

metadata.py  what llama.cpp computes from numbers
factors.py   divisors of the frequencies, as tensors
"""
