"""Which frame and which tier: everything that decides how a vector is coded.

The arithmetic of codes and their layout in a page is ``lowering.codes`` and
``lowering.layout``.
"""
