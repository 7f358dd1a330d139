"""Chat: conversations to token ids and labels, through the model's chat template.

encoder.py         an example to token ids and labels; the room's front door
renderer.py        the text that the chat template prints, with the place of every answer
call_arguments.py  arguments of calls in the form that a template takes (pure)
control_tokens.py  control tokens that a row contains as text, kept from becoming tokens
labels.py          which tokens carry loss (pure)
new_tokens.py      tokens that the job adds to the vocabulary
embedding.py       refuses token ids that the model has no embedding for
sandbox/           the process that runs chat templates, which strangers wrote
templates/         chat templates of known model families, by name
"""
