"""What each of the benchmarks takes: `python -m evals bench NAME --help`; what it does is imported when it runs."""
