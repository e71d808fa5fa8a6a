"""A whole model compressed, block by block."""
