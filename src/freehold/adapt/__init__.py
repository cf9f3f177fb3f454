"""Transforms of a built model: low-rank adapters. Tensors only; their files are engine/adapter.py's."""
