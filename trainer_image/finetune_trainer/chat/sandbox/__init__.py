"""Sandbox: chat templates, which strangers wrote, are rendered in a process of their own with limits.

process.py      the parent's side: starts the worker, asks it, replaces it when a template has killed it
worker.py       the process that renders; without environment, files and sockets
spans.py        finds the answers in the text that a template printed
marks.py        marks around an answer's words, which show where a template prints them
reasoning.py    what became of an answer's reasoning
environment.py  Jinja with the tags, filters and globals that chat templates expect

All but process.py run in the worker and import Jinja only.
"""
