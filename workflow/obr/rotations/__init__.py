"""Rotations and other transforms that leave a model's outputs as they are: random, read or learned."""
