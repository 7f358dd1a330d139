"""What a user writes below `spec`: one file a section, and `spec.py` that puts them together."""
