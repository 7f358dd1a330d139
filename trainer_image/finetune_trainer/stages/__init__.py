"""The six stages of the workflow, in the order in which pipeline.py calls them, and the judging of what they made.

model_loading.py            1: the base model, frozen, in 4 or 16 bits, and its tokenizer
nf4_copy.py                 a copy of the base in NF4 in the cache volume, from which the next run loads it
streamed_loading.py         a base that no GPU holds: layers are shared out, or moved to host memory, as they are loaded
expert_loading.py           experts of a mixture in NF4, quantised while they are loaded
vocabulary_growth.py        rows for new tokens in embedding and head
adapter_injection.py        2: the LoRA adapter, whose parameters are the only ones that train
expert_injection.py         adapters on experts, beside peft's
data_formatting.py          3: raw rows to token ids and labels, in one streaming pass
training_configuration.py   4: the job's training section as TRL's configuration
training.py                 5: the training loop: resume, train, stop in order, evaluate
saving.py                   6: adapter, merged weights and GGUF files, ready to publish
placement.py                the base whole on each GPU or a part on each, settled before it is loaded
fetching.py                 the sources, as every pod of a run fetches them
judging.py                  the loss of each of these files, beside those of the base and of the trained model
"""
