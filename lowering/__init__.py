"""Ops in, kernels out: page layout, direction codes, and the ops the pass inserts.

Knows nothing of models, caches or graphs. The eager reference of each op is its
specification; kernels are compared with it.
"""
