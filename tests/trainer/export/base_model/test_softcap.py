"""Attention with capped scores, where transformers would leave the cap out."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune_trainer.export.base_model.causal_model import choose_functions

SIZES = {
    "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20, "pad_token_id": 0,
}  # fmt: skip


def test_a_model_with_capped_scores_gets_the_attention_that_caps_them() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=0.01))
    ids = torch.arange(12)[None]
    right = model(input_ids=ids).logits

    model.config._attn_implementation = "flex_attention"  # as another version might choose
    choose_functions(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(input_ids=ids).logits, right)


def test_other_models_keep_their_attention() -> None:
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=None)),
        LlamaForCausalLM(LlamaConfig(**SIZES)),
    ):
        model.config._attn_implementation = "sdpa"
        choose_functions(model)
        assert model.config._attn_implementation == "sdpa"
