"""The base model of an export: a Hugging Face model folder, read once and passed on as one value.

folder.py           BaseModel: configs, locations of the tensors, tokenizer; files copied beside merged weights
full_config.py      config.json with every default filled in
tokenizer_files.py  tokenizer.json, tokenizer_config.json and the chat templates
published_tokenizer.py  the same files beside weights and adapters: the base's bytes, with what training changed
companions.py       what lies beside weights and adapters so that they answer, and stop
ends.py             the tokens at which an answer ends
grown_vocabulary.py  embedding and head with rows for new tokens
output_head.py      the head: the embedding once more, or weights of its own
json_files.py       JSON objects from files that others wrote
language_model.py   the language model inside a multimodal checkpoint, and what is copied beside it
adapter_names.py    the layers of an adapter, as it trains and as people load it
causal_model.py     transformers' language model of such a checkpoint, or of decoded weights
packed_tensors.py   weights in FP8 and MXFP4, decoded when they are read
mxfp4_blocks.py     weights in MXFP4 as blocks of GGUF, without decoding
nf4_tensors.py      weights that exist in NF4 only, dequantised when they are read
"""
