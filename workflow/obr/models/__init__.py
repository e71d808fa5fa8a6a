"""Transformer models: families, blocks one at a time, simulated low precision, checks, download."""
