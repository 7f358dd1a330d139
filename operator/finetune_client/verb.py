"""A command of the command line: its help, its options, and what carries it out."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One command: its help, its options, and the function that carries it out."""

    help: str
    examples: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace, Sequence[str]], int]
    """Takes the options and the words that no option takes; returns the exit code."""
