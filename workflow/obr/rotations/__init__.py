"""Rotations and other transforms that leave a model's outputs as they are: read, drawn, applied."""
