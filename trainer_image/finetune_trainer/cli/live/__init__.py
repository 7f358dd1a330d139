"""A run as its user sees it: a live view on a terminal, plain lines elsewhere.

follow.py      chooses between the two, and ends them with the run
readings.py    what both show: figures of the run in words, and the losses so far
view.py        the live view
lines.py       plain lines, at intervals
"""
