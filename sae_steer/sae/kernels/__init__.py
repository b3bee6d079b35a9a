"""A training step on sparse codes: portable in torch, compiled for CPUs, captured as a CUDA graph."""
