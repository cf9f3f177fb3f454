"""Pure functions on tensors: each op, its readable torch reference, and the choice of kernel.

No configuration of a model, no module, no request; what a file looks like is not known here either.
"""
