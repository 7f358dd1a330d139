"""The differentiable operations: each module exports `reference`, `forward`, `backward`, its autograd Function, and a
public function of the module's own name.

`reference` is the formula in PyTorch, which tests compare the kernels with; some modules also have `reference_forward`,
`reference_backward` or `reference_gradient`. `forward` and `backward` launch the kernels, for callers that save
activations themselves (`finetune_kernels.layers`).

rms_norm               RMSNorm or LayerNorm, with the residual stream's additions
rotary_embedding       RoPE of q and k, with their norm
attention              causal attention over packed sequences, by the fastest backend
softcap_attention      causal attention with capped scores (Gemma 2)
gated_activation       SwiGLU and GeGLU
adapted_activation     the same between merged projections, with LoRA deltas added on the way
plain_activation       the activation of an MLP without a gate, with its LoRA delta
expert_mlp             a mixture of gated MLPs over frozen weights, with adapters of each expert
lora_linear            a frozen linear layer with a LoRA adapter
linear_cross_entropy   the head and its loss, in chunks of rows
blocked_cross_entropy  the same with the head in host memory, in blocks of the vocabulary
"""
