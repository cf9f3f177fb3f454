"""Storage formats of weights and their codecs: bytes <-> values. Knows blocks and bits, no file, no model, no name."""
