"""Attention from codes on a CPU: a small C++ library, built at first use.

``library`` builds and loads it, ``kernels`` calls it; the sources are in ``src``.
"""
