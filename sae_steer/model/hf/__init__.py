"""Any causal language model that `transformers` runs, by its own forward, as a model of a pair."""
