"""The two blocks of a decoder layer, each with its norm; `decoder_layer` decides what they save.

attention_block.py   the first: norm, q k v, RoPE, attention, output projection
latent_attention.py  the first of a layer with latent attention
module_mixer.py      the first where a hybrid has no attention: norm, and transformers' own module
mlp_block.py         the second: norm, gate and up, activation, down projection
tiled_mlp.py         the same, or a mixture's, in tiles of rows
mixture_block.py     the second of a mixture of experts: norm, router, experts, and an MLP that all tokens share
"""
