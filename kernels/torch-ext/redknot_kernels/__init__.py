"""Attention over pages of single KV heads."""
