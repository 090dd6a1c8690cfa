"""Tasks, each a small file: its examples, its prompt and the metric that judges it."""
