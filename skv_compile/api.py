"""The verbs: ``skv.compile`` and ``skv.explain``."""

from __future__ import annotations

import functools
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
    target: Any = None, config: Config | None = None, *, mode: str | None = None, **overrides: Any
) -> Any:
    """Let a model keep its KV cache compressed.

    Args:
        target: a module instance (changed in place and returned), a module class or a function
            (decorated). Without it, a decorator with these settings is returned.
        config: a :class:`Config`; single fields may be given by name instead:
            ``skv.compile(model, bits=2.125)``.
        mode: of torch.compile. By default "reduce-overhead" for a transformers model on CUDA.

    Returns:
        ``target``; for a function, its compiled version.

    After ``skv.compile(model)`` on a transformers model, ``model.generate(**inputs)`` makes and
    uses a :class:`SphericalCache`. On any other module, attention over registered cache buffers is
    rewritten when the module first runs, and the buffers' memory is freed.

    Raises:
        ConfigError: an unknown or impossible setting; a target that cannot be compiled.
        UnsupportedError: an encoder-decoder model.
    """
    settings = make_config(config, **overrides)
    if target is None:
        return functools.partial(compile, config=settings, mode=mode)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return _decorate(target, settings, mode)
    if isinstance(target, nn.Module):
        if hf.is_hf_model(target):
            return hf.attach(target, settings, mode)
        target.compile(backend=SkvBackend(config=settings, mode=mode))
        return target
    if callable(target) and not isinstance(target, type):
        return torch.compile(target, backend=SkvBackend(config=settings, mode=mode))
    raise ConfigError(
        f"cannot compile {target!r}: expected a torch.nn.Module, a subclass of it, or a function."
    )


def _decorate(cls: type[nn.Module], config: Config, mode: str | None) -> type[nn.Module]:
    """Every instance of ``cls`` is compiled as soon as it is made."""
    original = cls.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:  # a subclass may not be finished yet
            compile(self, config, mode=mode)

    cls.__init__ = init
    return cls


def explain(model: Any, *args: Any, config: Config | None = None, **kwargs: Any) -> Report:
    """Run ``model(*args, **kwargs)`` once and report every attention: rewritten, or why not.

    The graphs are rewritten and run without Inductor. A transformers model that is given no
    cache gets a :class:`SphericalCache` of its own, and one more forward allocates it. A cache
    that is passed in advances as in any forward.

    Returns:
        A :class:`Report`: ``.sites`` (``.rewritten``, ``.reason``, ``.where``), ``str()``,
        ``.to_json()``.

    Raises:
        SkvError: the model is refused as a whole, not one of its attentions.
    """
    attachment = getattr(model, "_skv", None)
    settings = config or (attachment.config if attachment is not None else Config())
    forward = attachment._forward if attachment is not None else model
    if hf.is_hf_model(model) and kwargs.get("past_key_values") is None:
        kwargs = {**kwargs, "past_key_values": _cache_like(forward, model, settings, args, kwargs)}
    backend = SkvBackend(config=settings.replace(strict=False), options={"inner": "eager"})
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
    return Report(tuple(graph for graph in graphs if graph.sites or graph.plain))


def _cache_like(
    forward: Any, model: Any, config: Config, args: tuple, kwargs: dict
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
    cache = SphericalCache(model.config, ids.shape[1] + config.sinks + config.recent, config)
    with torch.no_grad():
        forward(*args, **{**kwargs, "past_key_values": cache})
    cache.reset()
    return cache
