"""Text generation with llama.cpp from a GGUF file: the proof that an exported model works where people use it.

Runs in a process of its own, because llama.cpp writes its log to the process's standard error and keeps its memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTEXT_LENGTH = 1024


def generate(model: Path, messages: list[dict[str, str]], *, tokens: int) -> str:
    """Greedy answer of `model` (a GGUF file) to a chat, at most `tokens` long; raises RuntimeError with llama.cpp's
    log."""
    return str(_ask(model, [{"messages": messages, "max_tokens": tokens}])[0])


def generate_all(model: Path, prompts: list[str], *, tokens: int) -> list[str]:
    """Greedy answers of a model that is not tiny: on every core, and with the time that takes."""
    requests = [{"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens} for prompt in prompts]
    return [str(answer) for answer in _ask(model, requests, threads=os.cpu_count() or 1, timeout=1800)]


def complete(
    model: Path, prompts: list[list[int]], *, tokens: int, banned: list[int], context: int = CONTEXT_LENGTH
) -> list[list[int]]:
    """Greedy continuations of token ids, `tokens` long each, without the `banned` ones.

    llama.cpp does not list tokens that end inside a UTF-8 character, so those must be banned. `context` decides
    between the short and the long divisors of longrope.
    """
    bias = [[token, False] for token in banned]
    requests = [{"prompt": prompt, "n_predict": tokens, "logit_bias": bias} for prompt in prompts]
    return [[int(token) for token in answer] for answer in _ask(model, requests, context)]


def log_probabilities(
    model: Path, prompts: list[list[int]], *, size: int, banned: list[int], context: int = CONTEXT_LENGTH
) -> list[list[float]]:
    """Log-probability of each of the `size` tokens after each prompt.

    llama.cpp lists nothing if it chooses one of the `banned` tokens (see `complete`). The probabilities are those
    before anything is banned.
    """
    bias = [[token, False] for token in banned]
    requests = [{"prompt": prompt, "n_predict": 1, "logprobs": size, "logit_bias": bias} for prompt in prompts]
    return [[float(value) for value in answer] for answer in _ask(model, requests, context)]


def banned_tokens(base: Path) -> list[int]:
    """Special tokens of the model in the folder `base`, tokens that are a part of a character, and rows of the
    embedding beyond the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    size = int(json.loads((base / "config.json").read_text())["vocab_size"])
    whole = {token for token in range(len(tokenizer)) if "\ufffd" not in tokenizer.decode([token])}
    return sorted(set(range(size)) - whole | set(tokenizer.get_added_vocab().values()))


def _ask(
    model: Path,
    requests: list[dict[str, Any]],
    context: int = CONTEXT_LENGTH,
    *,
    threads: int = 1,
    timeout: float = 120,
) -> list[Any]:
    """Answers to the requests; one thread and two minutes are for the tiny models of most tests."""
    document = {"model": str(model), "requests": requests, "context": context, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "finetune_test_programs.generation"],
        input=json.dumps(document),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp could not generate from {model.name}: {done.stderr[-2000:]}")
    answers: list[Any] = json.loads(done.stdout)
    return answers


def main() -> None:
    """Child process: read requests from standard input, write their answers as a JSON list to standard output."""
    document = json.load(sys.stdin)
    answer_to = os.dup(1)
    os.dup2(2, 1)  # llama.cpp prints to standard output as well; the answers must stay alone there

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = document["model"]
    params.n_ctx = document["context"]
    params.cpuparams.n_threads = document["threads"]
    params.warmup = False

    # As exact as llama.cpp can be: its default keeps keys and values in 16 bits.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED

    server = xllamacpp.Server(params)
    greedy = {"temperature": 0.0, "top_k": 1, "cache_prompt": False}
    answers = []

    for request in document["requests"]:
        if "messages" in request:
            answer = server.handle_chat_completions(request | greedy)
            answers.append(answer["choices"][0]["message"]["content"])
        elif "logprobs" in request:
            found = server.handle_completions(request | greedy)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            by_token = {token["id"]: token["logprob"] for token in found}
            answers.append([by_token[token] for token in range(request["logprobs"])])
        else:
            choice = server.handle_completions(request | greedy | {"logprobs": 1})["choices"][0]
            answers.append([token["id"] for token in choice["logprobs"]["content"]])

    with os.fdopen(answer_to, "w") as out:
        json.dump(answers, out)
    os._exit(0)  # the embedded server's threads need not be waited for


if __name__ == "__main__":
    main()
