"""Exports of packed checkpoints: formats of other programs, and the hub."""
