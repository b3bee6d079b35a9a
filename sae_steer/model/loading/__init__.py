"""Decoders on disk: Hugging Face Llama folders, read and written; InterpGPT releases and TransformerLens bundles, read.

What is read must fit exactly: a missing, extra or misshapen tensor is an error that lists the names.
Nothing is unpickled and no code of a folder runs.
"""

from sae_steer.model.loading.llama import save_decoder
from sae_steer.model.loading.reading import DecoderFile, load_decoder, read_decoder

__all__ = ["DecoderFile", "load_decoder", "read_decoder", "save_decoder"]
