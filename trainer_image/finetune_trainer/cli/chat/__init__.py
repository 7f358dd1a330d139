"""`finetune chat`: a conversation in the terminal with what a job made.

options.py      the options
command.py      what is shown: one answer, a conversation, or before and after side by side
find_model.py   the model that a user means: folders and files on this disk, and the base that they need
load_model.py   adapters, model folders and GGUF files as transformers' models
speaker.py      answers, token by token
"""
