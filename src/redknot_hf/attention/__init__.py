"""The seam with transformers: the attention function `"redknot"` and its masks."""
