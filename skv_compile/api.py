"""The verbs: ``skv.compile`` and ``skv.explain``."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from torch import nn

from .backend import SkvBackend
from .cache import phantom
from .cache.spherical import SphericalCache
from .config import Config, make_config
from .errors import ConfigError, UnsupportedError
from .integrations import hf
from .report import Report, listening


def compile(
    target: Any = None,
    config: Config | None = None,
    *,
    mode: str | None = None,
    dump: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Any:
    """Let a model keep its KV cache compressed.

    Args:
        target: a module instance (changed in place and returned), a module class or a function
            (decorated). Without it, a decorator with these settings is returned.
        config: a :class:`Config`; single fields may be given by name instead:
            ``skv.compile(model, bits=2.125)``.
        mode: of torch.compile. By default "reduce-overhead" for a transformers model on CUDA.
        dump: a folder that gets, of every graph that is compiled, what it was before and after, a
            report, and a script that runs the pass on it again. It changes nothing else.

    Returns:
        ``target``; for a function, its compiled version.

    After ``skv.compile(model)`` on a transformers model, ``model.generate(**inputs)`` makes and
    uses a :class:`SphericalCache`. On any other module, attention over registered cache buffers is
    rewritten when the module first runs, and the buffers' memory is freed.

    Raises:
        ConfigError: an unknown or impossible setting; a target that cannot be compiled; a folder
            for ``dump`` that cannot be written.
        UnsupportedError: an encoder-decoder model.
    """
    settings = make_config(config, **overrides)
    backend = SkvBackend(config=settings, mode=mode, options={"dump": dump})
    dump = backend.dump  # of whatever folder is the current one now
    if target is None:
        return functools.partial(compile, config=settings, mode=mode, dump=dump)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return _decorate(target, settings, mode, dump)
    if isinstance(target, nn.Module):
        if hf.is_hf_model(target):
            return hf.attach(target, settings, mode, dump)
        target.compile(backend=backend)
        return target
    if callable(target) and not isinstance(target, type):
        return torch.compile(target, backend=backend)
    raise ConfigError(
        f"cannot compile {target!r}: expected a torch.nn.Module, a subclass of it, or a function."
    )


def _decorate(
    cls: type[nn.Module], config: Config, mode: str | None, dump: str | os.PathLike[str] | None
) -> type[nn.Module]:
    """Every instance of ``cls`` is compiled as soon as it is made."""
    original = cls.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:  # a subclass may not be finished yet
            compile(self, config, mode=mode, dump=dump)

    cls.__init__ = init
    return cls


def explain(
    model: Any,
    *args: Any,
    config: Config | None = None,
    dump: str | os.PathLike[str] | None = None,
    max_cache_len: int | None = None,
    **kwargs: Any,
) -> Report:
    """Run ``model(*args, **kwargs)`` once and report every attention: rewritten, or why not.

    The graphs are rewritten and run without Inductor. A transformers model that is given no
    cache gets a :class:`SphericalCache` of its own, and one more forward allocates it. A cache
    that is passed in advances as in any forward.

    Args:
        config: of the cache; by default what ``skv.compile`` was given.
        dump: a folder for files about every graph, as in :func:`compile`.
        max_cache_len: tokens of the cache that a transformers model gets, which its bytes are
            counted for. By default those of the input, sinks and window.

    Returns:
        A :class:`Report`: ``.sites`` (``.rewritten``, ``.reason``, ``.where``, ``.kernel``),
        ``str()``, ``.to_json()``, ``.to_html()``.

    Raises:
        ConfigError: there is no input, ``dump`` cannot be written, or the cache has a length
            already and ``max_cache_len`` asks for one.
        SkvError: the model is refused as a whole, not one of its attentions.
    """
    attachment = getattr(model, "_skv", None)
    settings = config or (attachment.config if attachment is not None else Config())
    forward = attachment._forward if attachment is not None else model
    options = {"inner": "eager", "dump": dump}
    backend = SkvBackend(config=settings.replace(strict=False), options=options)
    own = hf.is_hf_model(model) and kwargs.get("past_key_values") is None
    if max_cache_len is not None and not own:
        raise ConfigError(
            f"max_cache_len={max_cache_len!r}: it is for a transformers model that is given no "
            "cache; here the cache has a length already. Leave it out."
        )
    if own:
        made = _cache_like(forward, model, settings, args, kwargs, max_cache_len)
        kwargs = {**kwargs, "past_key_values": made}
    backend.nonce = object()  # a graph compiled before would not be reported
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    dense = [(x, x.data, x.clone()) for x in buffers if phantom.state_of(x) is None]
    try:
        with listening() as graphs, torch.no_grad(), hf.own_errors():
            torch.compile(forward, backend=backend)(*args, **kwargs)
    except UnsupportedError:
        if not any(not site.rewritten for graph in graphs for site in graph.sites):
            raise  # no attention to blame
    finally:
        for buffer, data, values in dense:
            if phantom.state_of(buffer) is not None:  # the look must not change the module
                data.copy_(values)
                phantom.leave(buffer, data)
    seen = tuple(graph for graph in graphs if graph.sites or graph.plain)
    cache = kwargs.get("past_key_values")
    used = cache.config if isinstance(cache, SphericalCache) else settings
    return Report(seen, dataclasses.asdict(used))


def _cache_like(
    forward: Any, model: Any, config: Config, args: tuple, kwargs: dict, tokens: int | None
) -> SphericalCache:
    """An empty cache for one forward, allocated, so that the whole forward is one graph.

    Layers may differ in heads and head dim, which configs have many names for: the model is run
    and they are seen.
    """
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    ids = next((x for x in given if x is not None), None)
    if ids is None:
        raise ConfigError(
            "explain runs the model once and was given no input: skv.explain(model, input_ids)."
        )
    hf.check_model_class(model)
    if tokens is None:
        tokens = ids.shape[1] + config.sinks + config.recent
    cache = SphericalCache(model.config, tokens, config)
    with torch.no_grad():
        forward(*args, **{**kwargs, "past_key_values": cache})
    cache.reset()
    return cache
