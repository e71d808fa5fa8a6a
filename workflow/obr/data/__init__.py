"""Texts, and windows of tokens cut from them."""
