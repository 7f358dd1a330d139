"""The experts of a mixture: stacked frozen weights with an adapter for each expert, in place of transformers' module.

stacked_weight.py  the frozen weights of all experts: NF4, or 16 bits
module.py          the module: frozen weights, adapters, activation
replacing.py       puts it in place of a model's experts by their family's row, or says why not
routers.py         routers in fp32, and the load-balancing loss
"""
