"""Greedy answers of a model folder to prompts, as a user of transformers would get them: stops where its files say.

    python -P -m finetune_test_models.answers < REQUEST.json      {"model": DIR, "adapter": null, "prompts": [], ...}

The tokenizer and the ends of generation are the adapter's where there is one, else the model's.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKENS = 96
BATCH = 16


def answers(
    model: Path, prompts: list[str], *, adapter: Path | None = None, tokenizer: Path | None = None
) -> list[str]:
    """Answers of the model below `model`, with an adapter if given; `tokenizer` for a base that has no chat template.

    Special tokens are kept, but for the end that stopped the answer: an answer that runs on shows it.
    """
    request = {
        "model": str(model),
        "adapter": adapter and str(adapter),
        "tokenizer": str(tokenizer or adapter or model),
        "prompts": prompts,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finetune_test_models.answers"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{model} could not answer: {done.stderr[-2000:]}")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _generate(request: dict[str, Any]) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    on_gpu = torch.cuda.is_available()
    tokenizer: Any = AutoTokenizer.from_pretrained(request["tokenizer"], padding_side="left")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
        model.generation_config = GenerationConfig.from_pretrained(request["adapter"])
    model.to("cuda" if on_gpu else "cpu").train(False)

    said = []
    for start in range(0, len(request["prompts"]), BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in request["prompts"][start : start + BATCH]]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        said += [_text(tokenizer, model, row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    return said


def _text(tokenizer: Any, model: Any, tokens: list[int]) -> str:
    """The answer up to the first token that ends generation."""
    listed = model.generation_config.eos_token_id
    ends = set(listed) if isinstance(listed, list) else {listed}
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(tokenizer.decode(tokens[:stop]))


if __name__ == "__main__":
    print(json.dumps(_generate(json.load(sys.stdin))))
