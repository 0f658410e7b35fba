"""Hostile bytes for the codecs: `make fuzz`."""
