"""Products with frozen weights in bytes, which tensor cores multiply at twice the rate of 16-bit values.

byte_rows  `quantize_rows`: rows as E4M3 or int8, with a scale each
nf4_bytes  `decode`, `row_scales`: NF4 weights to bytes in one pass, as rows or as columns
fp8        `product`, `Fp8Weight`: E4M3 (Ada, Hopper and later); weights that are kept
int8       `product`, `rescale`: int8 (Turing, Ampere)
"""
