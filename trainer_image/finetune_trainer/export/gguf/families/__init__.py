"""The table of model families that become GGUF: one row each.

common.py    parts that rows of several kinds share
dense.py     families without experts and without states
mixtures.py  mixtures of experts
states.py    layers that keep a state instead of keys and values
gemma.py     the Gemma families
table.py     all rows, by model type; a model's row
"""
