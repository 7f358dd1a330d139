"""`finetune compare`: two results side by side.

command.py       options, and the tables that are shown
read_result.py   manifest, metrics and samples of a result, wherever it lies
figures.py       what is compared, as rows of text
"""
