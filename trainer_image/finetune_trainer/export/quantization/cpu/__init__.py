"""The encoders as machine code for CPUs, made by numba when first used; `encode.encode_compiled` is the way in."""
