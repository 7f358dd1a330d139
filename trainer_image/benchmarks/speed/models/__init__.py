"""Models of random weights.

checkpoint  written to a folder, in NF4 or 16 bits
on_device   mixtures whose NF4 weights are drawn where they are used
"""
