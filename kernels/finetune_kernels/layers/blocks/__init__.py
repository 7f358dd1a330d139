"""The blocks of a decoder layer, each with its norm; `decoder_layer` decides what they save.

attention_block.py   the first: norm, q k v, RoPE, attention, output projection
projected_heads.py   what the projections of q, k and v make, and the norm, RoPE and gate of its heads
latent_attention.py  the first of a layer with latent attention
module_mixer.py      the first where a hybrid has no attention: norm, and transformers' own module
mlp_block.py         the second: norm, gate and up, activation, down projection
tiled_mlp.py         the same, or a mixture's, in tiles of rows
layer_input_block.py a third, of layers with inputs of their own
mixture_block.py     the second of a mixture of experts: norm, router, experts, and an MLP that all tokens share
mlp_beside_experts.py  the second where each of the two reads the residual stream by norms of its own
"""
