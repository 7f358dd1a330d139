"""GGUF files: the tensors and metadata that llama.cpp expects of each model family.

files.py            the way in: all files of one model, written side by side
families/           one row a model family
family_row.py       the fields of a row
conversion.py       everything but the weights, planned; preflight plans the same
tensor_names.py     names of the tensors
tensors.py          the parts that a tensor becomes, and changes of their values
hyperparameters.py  metadata of the architecture
tokenizer.py        vocabulary, merges and scores
pre_tokenizers.py   llama.cpp's names for word patterns
special_tokens.py   ids of special tokens, chat templates
metadata.py         general.*: name, licence, ancestors, sampling
stored_weights.py   the way back: weights of a GGUF file under their Hugging Face names
rope/               RoPE: metadata and tensors of divisors
layers/             layers of one model that differ
state_layers/       layers that keep a state instead of keys and values
config_checks.py    config.json's numbers against the weights, its settings against what llama.cpp computes
"""
