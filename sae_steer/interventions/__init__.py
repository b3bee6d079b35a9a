"""What a feature does: edits of the residual stream, the change they make, and what chance alone would make."""
