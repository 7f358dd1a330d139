"""Judging of what an export wrote: the loss of the base, of the trained model and of every GGUF file on the same rows.

measure.py         the losses of everything that an export wrote: the way in
parameters.py      a model's parameters, made of the tensors of the files
weights.py         the weights to judge: of a folder, with or without an adapter, or of a GGUF file
streamed_model.py  the loss of a model of which one layer at a time is in memory
rows.py            the rows to judge on
verdict.py         the share of the training that weights keep, and when that is worth a warning
"""
