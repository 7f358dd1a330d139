"""Quantisation of weights into GGUF's tensor types, with the bytes that llama.cpp reads.

quantize.py          the way in: encodes weights as any tensor type
quantizers.py        the table of all tensor types
quantizer.py         the interface of one type
floats.py            F32, F16, BF16
plain.py             Q8_0, Q4_0, Q5_0, Q4_1, Q5_1: blocks of 32
affine.py            Q2_K, Q4_K, Q5_K: super-blocks with scales and minima
symmetric.py         Q3_K, Q6_K: super-blocks with scales alone
codebook.py          IQ4_NL, IQ4_XS, MXFP4: codes for values at uneven distances
super_blocks.py      what the two families of K-quants share
cpu/                 the compiled twin of each family
file_types.py        the file types that users name, such as Q4_K_M
tensor_types.py      the tensor type of each tensor in a file of a given type
streamed_encoder.py  encoding tensors into a file as they come
dequantize.py        the way back: weights from the bytes of any tensor type
"""
