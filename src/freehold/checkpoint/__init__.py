"""Files <-> models: what a checkpoint holds, which tensor is which parameter, how it is loaded, saved and fetched."""
