"""Export of trained models: merged weights and GGUF files in one streaming pass; `export.export` is the way in.

export.py         the pass: every tensor read once, merged, and given to every output
feasibility.py    the same questions before training
planned_merge.py  the same questions before a model is loaded: what names and types in the files tell (pure)
adapter.py        LoraWeights: a peft adapter, merged into the base tensor by tensor
expert_adapters.py  adapters on experts: their published names, and stacks of experts merged
merged_folder.py  the merged model as a Hugging Face folder
ollama.py         the Modelfile beside each GGUF file
chat_turns.py     the text that a chat template writes between messages
errors.py         errors that end an export
base_model/       the base model's folder, read once
tensor_io/        tensors between files and a device
quantization/     encoding of weights as GGUF's tensor types
gguf/             GGUF files: tensors and metadata
judge/            the loss of everything that was written, beside that of the base
"""
