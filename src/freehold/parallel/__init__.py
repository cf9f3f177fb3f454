"""One model trained by many processes: parts of data, weights and work for each, put on a decoder from outside it."""
