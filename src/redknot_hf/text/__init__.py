"""Texts as the tokens of a prompt: what a chat template writes around them, and where they meet."""
