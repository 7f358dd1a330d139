"""Model: facts about a model that its folder tells without its weights.

configuration/         transformers' configuration as it trains, without the base's own dropout (pure)
description.py         architecture, configuration and tokenizer, checked
base_models.py         signs that a model was never trained on conversations
adapter_targets.py     linear layers that get an adapter (pure)
layer_weights.py       weights of the layers: linear layers, and experts that are stacked (pure)
expert_files.py        names and order of experts in the files, and which of them an adapter is wanted on (pure)
coverage.py            share of them that gets an adapter, and that is in NF4 (pure)
planned_weights.py     the weights as a job will load them: coverage and bytes (pure)
cpu_advice.py          what would make a run on a CPU faster (pure)
weight_files.py        tensors of all weight files, by their headers, compared with the index
safetensors_header.py  the header of one safetensors file, wherever it lies
multimodal.py          checkpoints that also read images or sound: where their language model is (pure)
published_formats.py   weights in FP8 and MXFP4, by the names of their tensors (pure)
published_weights.py   which tensors train, which are copied, which are decoded (pure)
family_table.py        what was found of each model type: families.json, which `make architectures` writes (pure)
architectures.py       model types that can be trained, and those whose documents see each other (pure)
"""
