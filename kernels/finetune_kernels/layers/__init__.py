"""Runs transformers' decoder layers with LoRA adapters as fused functions, and patches what cannot be fused.

decoder_layer.py     one layer as one autograd function: which activations it saves, which it recomputes
attention_block.py   its first block: norm, q k v, RoPE, attention, output projection
module_mixer.py      the first block where a hybrid has no attention: norm, and transformers' own module
mlp_block.py         its second block: norm, gate and up, activation, down projection
tiled_mlp.py         the MLP block in tiles of rows
linear_group.py      frozen linear layers that read the same input, with their adapters
adapters.py          the adapters of such a group, as peft made them
lora_pass.py         one pass through them: plain LoRA, with dropout, with DoRA
frozen_weight.py     the frozen weights: dequantised where they are used, kept dequantised, or in FP8
layer_builder.py     builds a `DecoderLayer` of a transformers layer, or says why not
fused_layers.py      installs those layers in a model
patching.py          replaces single modules where a layer cannot be fused
packed_attention.py  attention over packed sequences, for layers that run module by module
supervised_loss.py   the loss through the fused head
host_memory.py       layer inputs in pinned host memory
"""
