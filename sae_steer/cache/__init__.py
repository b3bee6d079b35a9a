"""Residual streams of both models over the same texts, in HDF5 shards that are written whole or not at all.

1. Texts are dealt to shards in order, one split a shard; a shard's rows are a function of its texts alone.
2. Within a shard texts run in batches of like length; padding is neither stored nor computed past a batch's longest.
3. A shard is written beside, synced and renamed; then the manifest, which lists the finished shards, likewise.
   A killed run therefore continues at the first shard the manifest lacks, and ends in the same bytes.
4. Datasets are contiguous and uncompressed, so rows are read at their place in the file, once its checksum is right.

One row = one token position, the same in both models. The only importer of h5py.
"""

from sae_steer.cache.layout import LABELS, site
from sae_steer.cache.reading import ActivationCache
from sae_steer.cache.rows import ActivationRows
from sae_steer.cache.storage import DTYPES
from sae_steer.cache.writing import begun_precision, cache_activations

__all__ = ["DTYPES", "LABELS", "ActivationCache", "ActivationRows", "begun_precision", "cache_activations", "site"]
