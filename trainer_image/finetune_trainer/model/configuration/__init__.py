"""Configuration: transformers' configuration of a base model, as it trains.

reading.py  reads it from the model's folder: of the whole checkpoint, or of its language model alone
dropout.py  the base's own dropout, which is switched off (pure)
"""
