"""Which checkpoints hold a language model beside what reads images. Imports nothing: preflight has no PyTorch."""

TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Architecture of the whole -> that of its language model, which `export.text_part` takes out."""
