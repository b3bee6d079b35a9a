"""SAELens: its files, its other architectures, and its trainer."""
