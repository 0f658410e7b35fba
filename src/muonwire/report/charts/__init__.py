"""The charts of a comparison, one kind a file."""
