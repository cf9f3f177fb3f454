"""What a model is: its specification, its blocks, its states and the families' names for them. No files."""
