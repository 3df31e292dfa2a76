"""Graph in, sites out: which attentions of a model read a KV cache, and why the others cannot.

`match` takes the graph a `torch.compile` backend receives and finds every attention whose keys
and values come from two cache inputs, each written once before it is read. It knows nothing of
how a cache may be compressed. `registry` lists the spellings it understands.
"""

from .match import match
from .sites import CacheWrite, Mask, Match, Refusal, Site

__all__ = ["CacheWrite", "Mask", "Match", "Refusal", "Site", "match"]
