"""One language model: its decoder, files, training, sampling, and the edits of its residual stream."""
