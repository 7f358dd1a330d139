"""The quantizers as machine code for CPUs, which numba makes when it is first used.

encode.py        the way in: encoders by tensor type, on threads
floats.py        F32, F16, BF16; widening of 16-bit weights
plain.py         Q8_0, Q4_0, Q5_0, Q4_1, Q5_1
affine.py        Q2_K, Q4_K, Q5_K
symmetric.py     Q3_K, Q6_K
codebook.py      IQ4_NL, IQ4_XS, MXFP4
super_blocks.py  what the two families of K-quants share
float16.py       rounding to float16, which numba lacks
jit.py           the decorator of all compiled functions
"""
