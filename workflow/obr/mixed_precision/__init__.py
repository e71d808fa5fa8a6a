"""Bits and zeros chosen layer by layer."""
