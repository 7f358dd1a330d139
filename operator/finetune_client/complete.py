"""Names for the completion of bash, zsh, fish and kubectl: what could follow the words so far."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

from finetune_client.terminal.text import clean
from finetune_client.verb import Verb

TAKE_A_JOB = (
    "watch",
    "describe",
    "logs",
    "events",
    "cancel",
    "suspend",
    "resume",
    "retry",
    "estimate",
    "list",
    "artifacts",
)
NO_FILES = ":4"
"""Directive of kubectl's protocol (cobra): complete with these words alone, not with files."""
FILES_TOO = ":0"
_VALUES = ("-n", "--namespace", "--context", "--kubeconfig", "-o", "--output")
_FILES = ("--kubeconfig", "--download", "--credentials", "--results")
"""Options whose value is a file or a folder, which the shell completes itself."""

SCRIPTS = {
    "bash": """_finetune() {
  local IFS=$'\\n'
  local found=$(finetune __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | grep -v '^:')
  COMPREPLY=($(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _finetune finetune
""",
    "zsh": """#compdef finetune
_finetune() {
  local -a found
  found=(${(f)"$(finetune __complete "${(@)words[2,CURRENT]}" 2>/dev/null | grep -v '^:')"})
  if (( $#found )); then compadd -a found; else _files; fi
}
compdef _finetune finetune
""",
    "fish": """function __finetune
  set -l words (commandline -opc) (commandline -ct)
  finetune __complete $words[2..-1] 2>/dev/null | string match -v ':*'
end
complete -c finetune -a '(__finetune)'
""",
}


def candidates(words: Sequence[str], verbs: Mapping[str, Verb]) -> list[str]:
    """Return what the last of `words` could become; empty where nothing is known or the cluster does not answer."""
    if not words:
        words = [""]
    *before, begun = words
    previous = before[-1] if before else ""

    verb = next((word for word in before if word in verbs), None)
    if previous in ("-o", "--output"):
        found = ["json", "name", "wide", "yaml"]
    elif previous in _FILES:
        found = []
    elif previous in _VALUES or (verb in TAKE_A_JOB and not begun.startswith("-")):
        found = _ask(before, previous)
    elif begun.startswith("-"):
        found = _options_of(verbs[verb]) if verb else ["--help"]
    else:
        found = list(verbs) if verb is None else []

    return sorted(name for name in found if name.startswith(begun))


def _options_of(verb: Verb) -> list[str]:
    """Return the long options of a command, as its help lists them."""
    parser = argparse.ArgumentParser()
    verb.add_options(parser)
    return re.findall(r"^  (?:-\w(?: \S+)?, )?(--[a-z-]+)", parser.format_help(), flags=re.MULTILINE)


def _ask(before: Sequence[str], previous: str) -> list[str]:
    """Ask the cluster, or the kubeconfig, for names. Completion never fails: it offers nothing instead."""
    from finetune_client.connection import TIMEOUT, Cluster, context_names
    from finetune_client.errors import ClientError

    value = {word: after for word, after in pairwise(before) if word in _VALUES}
    kubeconfig = value.get("--kubeconfig")
    try:
        if previous == "--context":
            return [clean(name, 253) for name in context_names(kubeconfig)]
        cluster = Cluster.open(kubeconfig, value.get("--context"), value.get("-n") or value.get("--namespace"))
        if previous in ("-n", "--namespace"):
            with cluster.explained("list", "namespaces", ""):
                return [
                    clean(each.metadata.name, 253)
                    for each in cluster.core.list_namespace(_request_timeout=TIMEOUT).items
                ]
        return [clean(job["metadata"]["name"], 253) for job in cluster.list_jobs(cluster.namespace)]
    except ClientError:
        return []


def print_candidates(words: Sequence[str], verbs: Mapping[str, Verb]) -> None:
    """Print the candidates and kubectl's directive."""
    found = candidates(words, verbs)
    sys.stdout.write("".join(f"{name}\n" for name in (*found, NO_FILES if found else FILES_TOO)))
