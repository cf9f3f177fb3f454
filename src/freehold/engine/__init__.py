"""What runs a model: requests, generation, and the `Model` that the Python API hands out."""
