"""Packed checkpoints: written, read, verified, imported."""
