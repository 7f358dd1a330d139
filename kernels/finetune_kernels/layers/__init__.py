"""Runs transformers' decoder layers with LoRA adapters as fused functions, and patches what cannot be fused.

decoder_layer.py     one layer as one autograd function: which activations it saves, which it recomputes
one_block_layer.py   the same of a layer that has one block
blocks/              its two blocks: attention or another mixer, and an MLP or experts
linear_group.py      frozen linear layers that read the same input, with their adapters
adapters.py          the adapters of such a group, as peft made them
lora_pass.py         one pass through them: plain LoRA, with dropout, with DoRA
frozen_weight.py     the frozen weights: decoded where they are used, or kept; in the compute type, or in FP8
decoded_fp8.py       frozen NF4 weights, decoded to FP8 in each pass
layer_builder.py     builds a `DecoderLayer` of a transformers layer
mlp_builder.py       builds what stands behind attention in it: an MLP, experts, a third block
layer_check.py       says why a layer cannot be built
fused_layers.py      installs those layers in a model
patching.py          replaces single modules where a layer cannot be fused
packed_attention.py  attention over packed sequences, for layers that run module by module
supervised_loss.py   the loss through the fused head
host_memory.py       layer inputs in pinned host memory
"""
