"""Measurements of time, memory and quality, each a program: `python -m evals bench NAME --help`."""
