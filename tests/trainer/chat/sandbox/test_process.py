"""Templates that ask for more than there is, or lead out of the sandbox: the row is refused, the worker goes on."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.chat.sandbox.process import LimitError, RenderingLimits, RenderingProcess, TemplateSetup

LIMITS = RenderingLimits(seconds=1, mebibytes=512)
REQUEST: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}],
    "tools": None,
    "spans": False,
    "reasoning": False,
    "asked": False,
}
GREEDY = {
    "a long text": "{{ 'a' * 10**10 }}",
    "a power of a power": "{{ 10 ** (10 ** 10) }}",
    "a wide field": "{{ '%1000000000d' % 1 }}",
    "a wide format": "{{ '{:2000000000}'.format(1) }}",
    "a wide centre": "{{ 'a' | center(2000000000) }}",
    "a text doubled": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "a list doubled": (
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaa{% endfor %}{% endfor %}",
    "two equal trees": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "more than a row may print": "{{ 'a' * 50000000 }}",
    "a text replaced": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
}


def setup(template: str) -> TemplateSetup:
    return TemplateSetup(template, {}, ())


@pytest.fixture(scope="module")
def process() -> Iterator[RenderingProcess]:
    started = RenderingProcess(LIMITS)
    yield started
    started.close()


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_a_greedy_template_is_stopped_and_the_next_row_is_rendered(process: RenderingProcess, template: str) -> None:
    with pytest.raises(LimitError, match="more than 1 s of CPU time or 512 MiB"):
        process.ask(setup(template), REQUEST)
    assert process.ask(setup("{{ messages[0].content }}b"), REQUEST)["text"] == "ab"


WRONG = {
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "row"),
    "globals": ("{{ raise_exception.__globals__['x'] }}", "row"),
    "globals of a lambda": ("{{ strftime_now.__globals__.x }}", "row"),
    "a class through a format": ("{{ '{0.__class__.__mro__}'.format('') }}", "row"),
    "a private name in a namespace": ("{% set ns = namespace(__class__=1) %}", "row"),
    "a class through a filter": ("{{ '' | attr('__class__') | string }}{{ ('' | attr('__class__')).x }}", "row"),
    "a generator's frame": ("{{ (messages | map('upper')).gi_frame.f_globals }}", "row"),
    "an import": ("{% import 'os' as os %}", "row"),
    "no Jinja": ("{% for %}", "template"),
    "deep brackets": ("{{ " + "(" * 30_000 + ")" * 30_000 + " }}", "template"),
    "no template tag": ("{% endgeneration %}", "template"),
    "a mark without end": ("{% generation %}", "template"),
}


@pytest.mark.parametrize(("template", "error"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_has_a_reason(process: RenderingProcess, template: str, error: str) -> None:
    answer = process.ask(setup(template), REQUEST)
    assert (answer["error"], bool(answer["message"])) == (error, True)


def test_a_way_out_of_the_sandbox_leads_nowhere() -> None:
    """What a template could do if it ran Python: no environment, no file, no socket."""
    code = """
import os, socket, subprocess
from finetune_trainer.chat.sandbox.worker import confine
open("/dev/null").close()  # the control
confine(512)
for act in (lambda: open("/etc/passwd"), socket.socket, lambda: subprocess.run(["/bin/true"])):
    try:
        act()
    except OSError as error:
        print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["24", "24", "24"], done.stderr


def test_the_worker_sees_no_environment(process: RenderingProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    other = RenderingProcess(LIMITS)
    try:
        other.ask(setup("a"), REQUEST)
        assert other._process is not None
        with open(f"/proc/{other._process.pid}/environ", "rb") as file:  # noqa: PTH123
            assert b"hidden" not in file.read()
    finally:
        other.close()


def test_a_worker_that_does_not_start_is_no_fault_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with exit code 1 at its start"):
        RenderingProcess(LIMITS).ask(setup("a"), REQUEST)
