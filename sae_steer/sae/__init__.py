"""Dictionaries over vectors: architectures, kernels, losses, training, evaluation, SAELens files.

Knows rows of numbers only: no language model, no cache, no command line.
"""
