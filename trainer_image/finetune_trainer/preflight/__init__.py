"""Preflight: checks all that can be known of a job on a CPU, within minutes, before a GPU is asked for.

checks.py          the whole preflight: fetches what is checked, and writes the report
findings.py        errors and warnings as they are collected, and the model's facts
examination.py     examines model and rows, and makes the report of them
reuse.py           a result that is there already, so that nothing needs to be checked
scan.py            one streaming pass over the rows, in bounded memory
sampling.py        the rows that are encoded (pure)
statistics.py      token lengths and duplicates in numbers (pure)
steps.py           number of optimiser steps and tokens (pure)
gpu.py             GPU memory and time, by the memory plan (pure)
memory/            memory plans of a model that is not loaded, and where they put its weights (pure)
mixture_gpu.py     the same for mixtures of experts, whose layers run module by module (pure)
tallies/           what the scan counts, besides sample and statistics (pure)
judgements/        findings from what was counted, a file a subject (pure)
report.py          the report as data
html.py            the report as one self-contained page, by report.html.jinja
histogram.py       positions and sizes of the page's picture (pure)
table.py           the report for a terminal and for the termination message (pure)
process_memory.py  keeps the process small: no PyTorch, freed memory given back
"""
