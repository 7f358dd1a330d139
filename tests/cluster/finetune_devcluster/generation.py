"""llama.cpp speaks from a GGUF file: the proof that an exported model is usable where people use it.

Runs in a process of its own, because llama.cpp writes its log to the process's standard error and keeps its memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

CONTEXT_LENGTH = 1024


def generate(model: Path, messages: list[dict[str, str]], *, tokens: int) -> str:
    """Greedy answer of `model` (a GGUF file) to a chat, at most `tokens` long. RuntimeError carries llama.cpp's
    words."""
    request = json.dumps({"model": str(model), "messages": messages, "tokens": tokens})
    done = subprocess.run(
        [sys.executable, "-m", "finetune_devcluster.generation"],
        input=request,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp could not generate from {model.name}: {done.stderr[-2000:]}")
    return str(json.loads(done.stdout)["text"])


def main() -> None:
    """Child process: read a request from standard input, write {"text": ...} to standard output."""
    request = json.load(sys.stdin)
    answer_to = os.dup(1)
    os.dup2(2, 1)  # llama.cpp prints to standard output as well; the answer must stay alone there
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = CONTEXT_LENGTH
    params.cpuparams.n_threads = 2
    params.warmup = False
    server = xllamacpp.Server(params)
    answer = server.handle_chat_completions(
        {"messages": request["messages"], "max_tokens": request["tokens"], "temperature": 0.0}
    )
    with os.fdopen(answer_to, "w") as out:
        json.dump({"text": answer["choices"][0]["message"]["content"]}, out)
    os._exit(0)  # the embedded server's threads need not be waited for


if __name__ == "__main__":
    main()
