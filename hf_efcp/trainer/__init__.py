"""The Hugging Face side. Nothing is imported before it is used: transformers takes seconds."""
