"""Every decoder of the installed transformers, built tiny, with a compressed cache and without."""
