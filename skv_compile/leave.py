"""What the inputs of a graph forbid: sites that the pattern allows and whose memory is not ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .cache import phantom
from .errors import UnsupportedError
from .patterns import Match, Refusal, Site


def leave_out(found: Match, inputs: dict[Any, Any]) -> Match:
    """Refuse sites whose dense memory is also somebody else's. ``inputs``: of placeholders."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor) and phantom.state_of(x) is None]
    used = Counter(memory for x in tensors for memory in _memories(x))

    def foreign(site: Site) -> bool:
        return phantom.state_of(inputs[site.key.cache]) is None and _in_hf_cache(site.key.cache)

    def aliased(site: Site) -> bool:
        caches = [inputs[write.cache] for write in (site.key, site.value)]
        return any(
            phantom.state_of(x) is None
            and (
                any(used[memory] > 1 for memory in _memories(x))
                or x.untyped_storage().nbytes() > x.nbytes
            )
            for x in caches
        )

    found = _refused(
        found,
        foreign,
        "foreign-cache",
        "Its cache is a dense layer of a transformers cache, whose reset() and eager "
        "prefill write to that memory. Pass a skv.SphericalCache instead of a "
        "StaticCache; a sliding layer beside compressed ones stays as it is.",
    )
    found = _refused(
        found,
        aliased,
        "aliased",
        "Its cache shares memory with another tensor, which would not see what is "
        "written to a compressed one. Give keys and values a tensor each: "
        "torch.zeros(B, H, S, D), no part of a larger one.",
    )
    return _without_first_forward(found, inputs)


def _refused(found: Match, is_so: Callable[[Site], bool], code: str, reason: str) -> Match:
    """Sites of which something is so become refusals."""
    sites, refusals = [], list(found.refusals)
    for site in found.sites:
        if is_so(site):
            refusals.append(Refusal(site.index, site.attention, code, reason, site.where))
        else:
            sites.append(site)
    return Match(tuple(sites), tuple(refusals), found.plain)


def _memories(x: Tensor) -> list[object]:
    """What tells one piece of memory from another; fakes have none. A tensor that wraps others,
    such as a part of a weight under tensor parallelism, has theirs."""
    if isinstance(x, FakeTensor):
        return [id(x)]
    if is_traceable_wrapper_subclass(x):
        names, _ = x.__tensor_flatten__()
        parts = (getattr(x, name) for name in names)
        return [memory for part in parts if isinstance(part, Tensor) for memory in _memories(part)]
    return [(x.device, x.untyped_storage().data_ptr())]


def _without_first_forward(found: Match, inputs: dict[Any, Any]) -> Match:
    """Leave out attentions of a first forward, whose layer was allocated outside the graph."""
    if not any(getattr(x, "_skv_first_forward", False) for x in inputs.values()):
        return found
    kept = tuple(r for r in found.refusals if r.code != "cache-not-written")
    return Match(found.sites, kept, found.plain)


def refuse_phantoms(found: Match, inputs: Sequence[Any]) -> None:
    """A compressed cache that reaches a graph unrewritten would be read as NaN, or written over."""
    if not any(phantom.state_of(x) is not None for x in inputs):
        return
    reasons = "; ".join(f"{r.where or 'attention'}: {r.reason}" for r in found.refusals)
    raise UnsupportedError(
        "A compressed cache is used in a way that could not be rewritten: "
        f"{reasons or 'it is read or written outside an attention'}. "
        "Write it once per forward, just before its attention, or keep it dense."
    )


def _in_hf_cache(placeholder: Node) -> bool:
    """Whether Dynamo found the tensor at ``<cache>.layers[n].keys``."""
    name = source_name(placeholder)
    return re.search(r"\.layers\[\d+\]\.(keys|values)$", name) is not None


def source_name(placeholder: Node) -> str:
    """Where Dynamo found an input, such as "L['x']"; "" where it does not say."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")  # a method in some versions of torch, a property in others
    return name() if callable(name) else str(name)
