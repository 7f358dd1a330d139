"""The memory plans of a model that is not loaded, where they put its weights, and how fast it trains then. Pure.

fused_layers.py  why layers will not be fused
plans.py         the plans for a job's largest pass, with all weights on each GPU or a part of them
parallelism.py   whether each GPU keeps all weights or a part of them, and why it may have to keep all
speed.py         tokens a second
"""
