"""Parts of the operations and layers that have no gradient of their own; a module with a kernel also exports
`reference`, the same by its formula in PyTorch.

attention            attention by its formula and by kernels of others, and its inputs as values
lora_delta           the two factors of what a LoRA adapter adds
head_norm            `HeadNorm`: the norm of q and k, and of v, per head or per row, before RoPE or after it
rotary_pairs         parts of the kernels of RoPE
adapter_dropout      `drop`, `add_lora_dx`: dropout whose masks are drawn again where they are used
dora                 `row_norms`, `magnitude_gradient`: DoRA's norms and the gradient of its magnitudes
nf4                  `dequantize`, `dequantize_stack`: 4-bit weights to 16 bits
nf4_stack            `Nf4Stack`: matrices of one shape in NF4, each as if it were alone
grouped              products and sums of rows that are sorted into groups, one for each expert
expert_projection    `Projection`: a linear layer of all experts, with adapters; `Rows`: their sorted rows
byte_products        products in FP8 and int8, and NF4 decoded for them
gather_rows          `gather_rows`: rows of a table in host memory
pinned_memory        pinned host memory in pieces, which waste nothing
master_weights       fp32 values of parameters that compute in 16 bits
multi_tensor_adamw   `MultiTensorAdamW`: AdamW over many tensors in one launch, on master weights
precision            `widen`: the type of the formulas; `before_ampere`: cards without bfloat16
"""
