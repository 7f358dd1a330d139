"""GGUF files: which tensors and metadata llama.cpp expects of each model family, and our quantisers in torch."""
