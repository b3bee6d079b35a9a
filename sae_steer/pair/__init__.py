"""Two models that differ in training, what they share, and how a pair is made."""
