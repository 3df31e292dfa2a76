"""The torch.compile backend ``skv``.

``torch.compile(model, backend="skv", mode=..., options=...)`` and
``model.compile(backend="skv")`` find it through an entry point, with no import of ours.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from .cache import phantom
from .cache.home import make_keeper
from .cache.journal import Journal
from .cache.state import LayerState
from .config import Config, make_config, nearest
from .dump import Trail, check_folder
from .errors import CacheStateError, ConfigError, UnsupportedError, shown
from .leave import leave_out, refuse_phantoms
from .lowering import ops
from .patterns import Match, Site, match
from .report import GraphReport, record
from .retention.keeper import Keeper
from .rewrite import rewrite
from .salt import config_patches

log = logging.getLogger(__name__)

#: Options of the backend that are not settings of the cache.
BACKEND_OPTIONS = {
    "dump": "folder for what the pass did to every graph: NNN_before.py, NNN_after.py, "
    "NNN_report.json and NNN_repro.py, which runs the pass again",
    "inductor": "dict of torch._inductor.config settings for the graphs compiled here",
    "inner": "what compiles the rewritten graph: 'inductor' (default) or 'eager'",
}


def skv(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the attention sites of a graph and compile it.

    Args:
        gm, example_inputs: from Dynamo.
        mode: as for Inductor ("default", "reduce-overhead", "max-autotune", ...).
        options: fields of :class:`Config`, and those of ``BACKEND_OPTIONS``. Of a
            ``SphericalCache`` the cache's own config counts.

    Raises:
        ConfigError: an unknown option or mode, or a folder for ``dump`` that cannot be written.
        UnsupportedError: a gradient is required, or, with ``strict``, an attention that has a
            cache could not be rewritten.
    """
    return SkvBackend(mode=mode, options=options)(gm, example_inputs)


class SkvBackend:
    """The backend with its settings validated."""

    _skv_backend = True

    def __init__(
        self,
        *,
        config: Config | None = None,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        settings, extra = split_options(options or {})
        self.config = make_config(config, **settings)
        self.inner = extra.get("inner", "inductor")
        if not isinstance(self.inner, str) or self.inner not in ("inductor", "eager"):
            raise ConfigError(f"inner={shown(self.inner)}: expected 'inductor' or 'eager'.")
        inductor = extra.get("inductor", {})
        if not isinstance(inductor, dict):
            raise ConfigError(
                f"inductor={shown(inductor)}: expected a dict of Inductor's settings, such as "
                "{'max_autotune': True}."
            )
        dump = extra.get("dump")
        # No setting of the cache: no layout, signature or key of a compiled graph depends on it.
        self.dump = None if dump is None else check_folder(dump)
        self.nonce: object = None  # set where a graph must not be shared with an equal backend
        self.inductor = {**_mode_options(mode), **inductor}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SkvBackend) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.config, self.inner))

    def _key(self) -> tuple:
        inductor = tuple(sorted(self.inductor.items()))
        # Dynamo would take an equal backend's graph, of which nothing would be dumped.
        return (self.config, self.inner, self.nonce, self.dump, inductor)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        trail = Trail(self.dump)
        trail.before(gm, example_inputs, self.config)
        found = match(gm.graph)
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        inputs = dict(zip(nodes, example_inputs, strict=True))
        found = leave_out(found, inputs)
        states = _states_for(found.sites, inputs, self.config)
        report = GraphReport.of(found, states)
        record(report)
        trail.report(report, states[0].config if states else self.config)
        self._speak_of(found)
        if not found.sites:
            refuse_phantoms(found, example_inputs)
            trail.after(gm)
            return self._compile(gm, list(example_inputs), self.config)
        refuse_gradients(example_inputs)
        done = rewrite(gm, found, states, example_inputs)
        trail.after(done.module)
        refuse_phantoms(found, [example_inputs[n] for n in done.kept])
        inner = self._compile(done.module, done.example_inputs, states[0].config)
        columns = [nodes.index(site.key.cache) for site in found.sites]
        values = [nodes.index(site.value.cache) for site in found.sites]
        lengths = [site.key.source.meta["example_value"].shape[2] for site in found.sites]
        one_token = all(isinstance(n, int) and n == 1 for n in lengths)
        tokens = 1 if one_token else 1 << 30
        # The runtime knows signatures only: a graph must not keep the cache alive that made it.
        signatures = [state.signature for state in states]
        groups = [state.group for state in states]
        sliced = {n for n, site in enumerate(found.sites) if site.key.position_is_start}
        return _runtime(
            inner, done.kept, columns, values, signatures, groups, sliced, self.config, tokens
        )

    def _speak_of(self, found: Match) -> None:
        # A sliding layer is bounded, and beside compressed layers a dense one is there by design.
        benign = {"sliding", "foreign-cache"} if found.sites else {"sliding"}
        for harmless in (True, False):
            rows = [r for r in found.refusals if (r.code in benign) == harmless]
            if not rows:
                continue
            lines = [f"  {r.where or 'attention ' + str(r.index)}: {r.reason}" for r in rows]
            text = "\n".join([f"{len(rows)} attention(s) with a cache left dense:", *lines])
            if self.config.strict and not harmless:
                raise UnsupportedError(f"{text}\nstrict=True asks for all of them.")
            log.log(logging.INFO if harmless else logging.WARNING, text)

    def _compile(
        self, gm: GraphModule, example_inputs: list[Any], config: Config
    ) -> Callable[..., Any]:
        if self.inner == "eager":
            return gm
        from torch._inductor.compile_fx import compile_fx

        patches = {**self.inductor, **config_patches(config)}
        return compile_fx(gm, example_inputs, config_patches=patches)


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options -> fields of ``Config``, and options of the backend; unknown names raise."""
    fields = [f.name for f in dataclasses.fields(Config)]
    known = [*fields, *BACKEND_OPTIONS]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r} for backend 'skv'.{nearest(name, known)}")
    settings = {k: v for k, v in options.items() if k in fields}
    return settings, {k: v for k, v in options.items() if k not in fields}


def _mode_options(mode: Any) -> dict[str, Any]:
    if mode is None:
        return {}
    known = torch._inductor.list_mode_options()
    if not isinstance(mode, str) or mode not in known:
        raise ConfigError(f"mode={shown(mode)} is not known.{nearest(str(mode), list(known))}")
    return dict(known[mode])


def _states_for(sites: Sequence[Site], inputs: dict[Any, Any], config: Config) -> list[LayerState]:
    """The states behind sites: those of their phantoms, or new ones for dense buffers."""
    states = [_state_of(site, inputs, config) for site in sites]
    for site, state in zip(sites, states, strict=True):
        if state is not None:
            state.check_group(site.group_size, site.where)
    dense = [site for site, state in zip(sites, states, strict=True) if state is None]
    groups = [site.group_size for site in dense]
    made = iter(_new_states([inputs[site.key.cache] for site in dense], groups, config))
    return [next(made) if state is None else state for state in states]


def _state_of(site: Site, inputs: dict[Any, Any], config: Config) -> LayerState | None:
    """The state that rides on a site's phantom, None for a dense buffer."""
    key, value = inputs[site.key.cache], inputs[site.value.cache]
    if isinstance(key, FakeTensor):
        raise UnsupportedError(
            "The cache reached the backend without its data (export or ahead-of-time compilation). "
            "Use torch.compile on the running model."
        )
    state, other = phantom.state_of(key), phantom.state_of(value)
    if state is not other:
        raise CacheStateError("keys and values of one attention belong to different caches.")
    if state is not None and state.adopted and state.config != config:
        raise ConfigError(
            f"this buffer already holds a cache made with {state.config}; {config} is asked "
            "for. Compile a new module, or ask for the same settings."
        )
    return state


def _new_states(dense: Sequence[Tensor], groups: Sequence[int], config: Config) -> list[LayerState]:
    """Empty states for dense cache buffers [B, H, S, D]; equal ones share a pool and its budget.

    ``groups``: query heads of a kv head, of each.
    """
    kinds = [
        (tuple(x.shape), x.dtype, x.device, group) for x, group in zip(dense, groups, strict=True)
    ]
    keepers: dict[Any, Keeper] = {}
    states = []
    for kind in kinds:
        (batch, heads, slots, head_dim), dtype, device, group = kind
        shape = (batch, heads, head_dim, slots, dtype, device)
        if kind not in keepers:
            budget, count = config.budget_bytes, kinds.count(kind)
            part = None if budget is None else budget * count // len(kinds)
            keepers[kind] = make_keeper(config, count, *shape, group, part, False)
        states.append(LayerState(config, *shape, group=group, keeper=keepers[kind]))
    return states


def refuse_gradients(inputs: Iterable[Any]) -> None:
    """Raise if one of the tensors would need a gradient now."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise UnsupportedError(
            "A gradient is required, and a compressed cache has none. Call the model under "
            "torch.no_grad() or torch.inference_mode(), or train with a dense cache."
        )


def _runtime(
    inner: Callable[..., Any],
    kept: Sequence[int],
    keys: list[int],
    values: list[int],
    signatures: list[str],
    groups: list[int],
    sliced: set[int],
    config: Config,
    tokens: int,
) -> Callable[..., Any]:
    """What Dynamo calls: original inputs in, state tensors looked up on the phantoms.

    ``kept``: columns of the original inputs that stay; ``keys``, ``values``: those of the sites'
    caches, ``groups`` their query heads a kv head; ``sliced``: sites that write a slice;
    ``config``: of caches for dense buffers. ``tokens`` is 1 for a graph that decodes one token a
    row, else more.
    """
    journal = Journal()

    def adopt(args: tuple) -> None:
        """Dense buffers become phantoms; what they hold already is stored first."""
        pairs = [n for n, key in enumerate(keys) if phantom.state_of(args[key]) is None]
        # Every instance that runs this graph has states of its own.
        made = _new_states([args[keys[n]] for n in pairs], [groups[n] for n in pairs], config)
        for n, own in zip(pairs, made, strict=True):
            key, value = keys[n], values[n]
            if phantom.state_of(args[key]) is None:
                own.adopted = True
                _import(args[key], args[value], own)
                for dense in (args[key], args[value]):
                    phantom.vacate(dense, own, sliced=n in sliced)

    def run(*args: Any) -> Any:
        feed = [args[n] for n in kept]
        current = []
        for key, signature in zip(keys, signatures, strict=True):
            state = phantom.state_of(args[key])
            if state is None:
                adopt(args)
                state = phantom.state_of(args[key])
                assert state is not None
            if state.signature != signature:
                raise CacheStateError(
                    f"this graph was compiled for a cache of {signature} and was given one of "
                    f"{state.signature}. Compile again (torch._dynamo.reset()) for the new cache."
                )
            feed.extend(state.tensors)
            current.append(state)
        for keeper in {id(state.keeper): state.keeper for state in current}.values():
            keeper.graphs += 1
            keeper.tick(tokens)
        for state in current:
            journal.record(state, tokens)  # nothing to keep on an accelerator
        try:
            with ops.running(current):
                out = inner(*feed)
        except BaseException:
            journal.rollback()
            raise
        journal.commit()
        return out

    return run


def _import(key: Tensor, value: Tensor, state: LayerState) -> None:
    """Store what a dense cache already holds, up to its last slot that is not zero."""
    if key.untyped_storage().nbytes() < key.nbytes:
        raise CacheStateError(
            "this buffer's compressed cache was lost: the module was converted, copied or moved "
            "after its first compiled step. Do that before, or register new cache buffers."
        )
    used = (key != 0).any(-1).any(1).any(0) | (value != 0).any(-1).any(1).any(0)
    count = int(used.nonzero().max()) + 1 if used.any() else 0
    if count:
        position = torch.arange(count, device=key.device)
        held = key[:, :, :count], value[:, :, :count], None, position
        if count > 1:  # nobody knows who asked: every token is worth the same
            batch, heads, _, dim = key.shape
            q = key.new_zeros(batch, heads * state.group, count, dim)
            state.retain(q, *held, dim**-0.5)
        state.append(*held)
