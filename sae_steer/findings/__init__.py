"""Findings of the released study, asked of any pair."""
