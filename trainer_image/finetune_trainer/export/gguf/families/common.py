"""Parts that rows of several kinds share."""

from typing import Any

from gguf import ExpertGatingFuncType

from finetune_trainer.export.gguf.family_row import Split

GATE_UP = ("experts.gate_proj.weight", "experts.up_proj.weight")
GRANITE_SCALES = {
    "attention_multiplier": "attention_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
EXPERT_WIDTHS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
ROUTED = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}
SIGMOID = {"expert_gating_func": ExpertGatingFuncType.SIGMOID}
ALL_ROUTED = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
LLAMA: dict[str, Any] = {"permuted_heads": True, "rope_dimensions": True, "rope_tensors": True}
SHARED_EXPERT_SPLITS = {
    "block_sparse_moe.input_linear.weight": Split(("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")),
    "shared_mlp.input_linear.weight": Split(("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight")),
}
TANH_GELU = "gelu_pytorch_tanh"
