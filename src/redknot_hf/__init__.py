"""A head-aware KV cache for Hugging Face Transformers."""
