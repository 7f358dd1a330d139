"""Preflight: everything that can be known of a job on a CPU, within minutes, before a GPU is asked for.

reuse.py        a result that is there already: nothing needs to be checked then
checks.py       the whole preflight: access, output, rows, template; every finding is collected
scan.py         one streaming pass over the rows, in bounded memory
sampling.py     which rows are encoded (pure)
statistics.py   what the lengths say (pure)
steps.py        how many optimiser steps follow (pure)
report.py       the report as data
html.py         the report as one self-contained page (pure); histogram.py draws its picture
freed_memory.py  what the C library keeps of freed memory, given back
gpu.py          GPU memory and time, by the memory plan (pure)
table.py        the report for a terminal and for the termination message (pure)
"""
