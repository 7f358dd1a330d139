"""Benchmarks of the kernels, each alone on one GPU; whole training systems are measured in trainer_image/benchmarks.

linear_attention  a program of its own: fla's kernels of linear attention beside transformers' loops
micro             the program: times every case and writes micro.csv
micro_case        one case: a call, its cost, and the calls that it is compared with
micro_cases       cases of norms, rotation, activations and the head
micro_attention   cases of attention by backend, of softcap attention, and of the optimiser
micro_linears     cases of linear layers in bfloat16 and FP8, and of adapter dropout
micro_bytes       cases of NF4 decoding to 16 bits and to bytes, and of products with decoded bytes
gathered_nf4      NF4 decoded to 16 bits by another kernel, for comparison
permuted_nf4      NF4 decoded to E4M3 by another kernel, for comparison
micro_results     micro.csv as values, and its table for docs/benchmarks.md
provenance        the commit and the package versions that were measured
rows_file         adds rows to CSV files of measurements
"""
