"""Modelfiles: Go's own template engine writes what the Jinja template writes, for the templates of the families."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune_test_programs.binaries import find_go
from finetune_trainer.export.base_model.json_files import load_json_if_present
from finetune_trainer.export.base_model.tokenizer_files import TokenizerFiles
from finetune_trainer.export.chat_turns import find_chat_turns
from finetune_trainer.export.ollama import OllamaChat, read_ollama_chat, to_go_template, write_modelfile

Message = dict[str, str]
PUBLISHED = Path(trl.__file__).parent / "chat_templates"
# Mistral's first template, Zephyr's, and a base model's own: text that Go's engine or a Modelfile could stumble over.
WRITTEN = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "awkward": (
        "{% for m in messages %}{{ '{{' + m['role'] + '}} \"\"\" {' + m['content'] + '{%\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '`{{-' }}{% endif %}"
    ),
}
PUBLISHED_NAMES = ("llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "phi3_5", "cohere")
TALK = [
    {"role": "user", "content": "Hi {{ .System }}"},
    {"role": "assistant", "content": "Hello!\n\nHow are you?"},
    {"role": "user", "content": 'Fine, "thanks".'},
]
SYSTEM = {"role": "system", "content": "Be kind."}


def templates() -> dict[str, str]:
    return {name: (PUBLISHED / f"{name}.jinja").read_text() for name in PUBLISHED_NAMES} | WRITTEN


def render_with_go(tasks: list[tuple[str, list[Message]]]) -> list[str]:
    program = Path(__file__).parent / "go_template/main.go"
    asked = json.dumps([{"Template": template, "Messages": messages} for template, messages in tasks])
    done = subprocess.run([find_go(), "run", str(program)], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rendered: list[str] = json.loads(done.stdout)
    return rendered


def read_chat(folder: Path) -> OllamaChat:
    config, generation = (load_json_if_present(folder / f"{name}.json") for name in ("config", "generation_config"))
    return read_ollama_chat(TokenizerFiles(folder), config, generation)


def in_modelfile(modelfile: str) -> str:
    """TEMPLATE as Ollama reads it: up to the next three quotation marks."""
    found = re.search(r'^TEMPLATE """(.*?)"""', modelfile, re.DOTALL | re.MULTILINE)
    assert found is not None, modelfile
    return found[1]


def test_go_renders_what_jinja_renders_for_every_family(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tasks, expected, names = [], [], []
    for name, template in templates().items():
        turns = find_chat_turns(template, special)
        assert turns is not None, name
        modelfile = write_modelfile("m.gguf", OllamaChat(turns, (), has_template=True, says_date=False))
        conversations = [TALK, TALK[:1]] + ([[SYSTEM, *TALK]] if turns.before_system is not None else [])
        for messages in conversations:
            names.append(name)
            tasks.append((in_modelfile(modelfile), messages))
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False, **special
            )
            expected.append(text)

    found = render_with_go([*tasks, (tasks[0][0].replace("user", "usr"), TALK)])
    wrong = [name for name, text, other in zip(names, expected, found, strict=False) if text != other]
    assert not wrong
    assert found[-1] != expected[0], "a damaged template must be seen"
    assert {name for name in names if names.count(name) == 2} == {"gemma", "mistral"}, "these take no system message"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else '' }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
    ids=["the last message only", "other text", "numbered turns", "answers left out", "refuses"],
)
def test_a_template_that_does_more_has_no_turns(template: str) -> None:
    assert find_chat_turns(template, {}) is None


def test_a_system_message_without_a_fixed_place_is_not_promised() -> None:
    moved = "{% for m in messages %}<{{ m['content'] + messages[0]['content'] }}>{% endfor %}"
    plain = "{% for m in messages if m['role'] != 'system' %}<{{ m['content'] }}>{% endfor %}"
    assert find_chat_turns(moved, {}) is None
    turns = find_chat_turns(plain, {})
    assert turns is not None
    assert "SYSTEM has no effect" in write_modelfile("m.gguf", OllamaChat(turns, (), True, False))


def test_a_modelfile_names_file_template_and_stop_words(tiny_base: Path) -> None:
    modelfile = write_modelfile("tiny-Q8_0.gguf", read_chat(tiny_base))
    assert "FROM ./tiny-Q8_0.gguf\n" in modelfile
    assert modelfile.endswith('PARAMETER stop "<|im_end|>"\n')
    assert in_modelfile(modelfile).startswith("{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n")


def folder_with(tiny_base: Path, folder: Path, template: str | None, **settings: object) -> Path:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (folder / "config.json").write_text((tiny_base / "config.json").read_text())
    return folder


def test_a_file_without_a_known_template_says_so(tiny_base: Path, tmp_path: Path) -> None:
    odd = folder_with(tiny_base, tmp_path / "odd", "{{ messages[-1]['content'] }}")
    none = folder_with(tiny_base, tmp_path / "none", None)
    for folder, part in (
        (odd, "Ollama uses the template in the GGUF"),
        (none, "the tokenizer has no chat template"),
    ):
        modelfile = write_modelfile("m.gguf", read_chat(folder))
        assert part in modelfile
        assert "\nTEMPLATE" not in modelfile


def test_a_beginning_token_that_the_file_adds_is_not_in_the_template(tiny_base: Path, tmp_path: Path) -> None:
    """Ollama lets the file's own switch add it: with both, the model would see it twice."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    settings = {"bos_token": "<|im_start|>"}
    for adds, count in ((True, 0), (False, 2)):
        folder = folder_with(tiny_base, tmp_path / str(adds), template, add_bos_token=adds, **settings)
        turns = read_chat(folder).turns
        assert turns is not None
        assert to_go_template(turns).count("<|im_start|>") == count
