"""Figures, drawn by matplotlib from artefacts."""
