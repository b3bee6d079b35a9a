"""Many features at once: exact effects of the specific ones, estimates for all others."""
