"""Kernels of others that compute attention, each behind the same two functions, without a gradient of their own.

ragged.py       cuDNN's for sequences of mixed lengths, by NVIDIA's package for cuDNN's graphs
ragged_plan.py  what that is compiled for
"""
