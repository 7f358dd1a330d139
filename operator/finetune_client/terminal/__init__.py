"""Text of a cluster as a terminal shows it: cleaned, in words, in lines and in blocks. Pure but for printing.

text.py        text of a cluster for a terminal: no control characters, bounded
screen.py      lines and tables as every command prints them
sparkline.py   numbers as a line of blocks
fitted.py      tables that fit a terminal of any width
usage.py       GPU time, waiting, cost and energy of a job, in words
"""
