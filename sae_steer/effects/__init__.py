"""What an edit does: exact readings at onsets, estimates with intervals, firings, traces and sampled text."""
