"""Mixers of hybrids other than attention: transformers' own modules (linear attention, Mamba, short convolutions),
which run document by document here.

documents.py         packed documents as padded batches of documents of about one length
isolation.py         modules that keep packed documents apart, whatever runs them
linear_attention.py  fla-core's kernels for linear attention, which take packed documents as they are
tuning.py            fla's kernels that are not to be tuned while a run trains
"""
