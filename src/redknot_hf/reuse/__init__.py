"""Texts prefilled once: the store of their keys and values, and caches assembled from it."""
