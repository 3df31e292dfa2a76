"""Compressed layers, the phantoms that stand for them, and the Hugging Face cache around both."""
