"""Measures what a choice costs in quality: the loss on held-out rows after whole runs, on a machine with a GPU.

masters        master weights of adapters, with and without
fp8            FP8 beside bfloat16: all runs, several at once, and the verdict
cell           one run: trained, exported, and what was exported loaded anew and evaluated
bases          small models of other families, trained from random weights by plain PyTorch
conversations  real conversations, split into what is read before, trained on and held out
verdict        paired differences beside the spread of the seeds
job            the job that a run is
"""
