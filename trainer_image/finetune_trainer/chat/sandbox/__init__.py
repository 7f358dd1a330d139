"""Chat templates, which others wrote, rendered in a process of their own with limits, and the answers in what they
print.

    chat_rendering.py -> process.py | worker.py -> spans.py -> environment.py

What stands right of the bar runs in the worker and imports Jinja only.
"""
