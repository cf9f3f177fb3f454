"""What judges a model: the laws of the design, run on real ones."""
