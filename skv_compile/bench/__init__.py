"""Benchmarks of one attention and of whole decoding steps, side by side in one run."""
