"""Parts of `python -m evals bench serving`: each yields rows of what it measured, with the bars they are to reach."""
