"""Architectures of transformers that the kernels know: pre-norm layers with a gated MLP; causal attention, with a
window and a cap at most, without sinks or biases; and a head that is a linear layer, capped or not."""

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
