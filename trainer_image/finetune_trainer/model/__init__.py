"""Model: facts about a model that its folder tells without its weights.

description.py      architecture, configuration and tokenizer, checked
adapter_targets.py  linear layers that get an adapter (pure)
"""
