"""Proof: digests, and what will be signed, logged and bundled. No torch, no models."""
