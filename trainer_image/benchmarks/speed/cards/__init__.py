"""Smaller cards, emulated: PyTorch's allocator refuses to go beyond their memory.

emulated.py    the limit, and a base model as a run on such a card would load it
longest.py     search for the longest sequence that trains; rows of `python -P -m speed.run`
every_card.py  the default plan on cards of every size: does it hold, and what does it leave? A program of its own
"""
