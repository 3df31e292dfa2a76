"""``SphericalCache``: a Hugging Face Cache whose full-attention layers are compressed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from ..codec.rotary import rotary_plan
from ..codec.saved import SavedFrames, load_frames
from ..codec.tiers import choose_layout, tier_names
from ..config import Config, make_config
from ..errors import CacheStateError, ConfigError, UnsupportedError, shown
from ..lowering.state import LENGTH
from ..retention.keeper import Keeper
from .journal import Journal
from .layer import SphericalLayer
from .rows import select_rows
from .state import SHARED, LayerState

#: What the layers of transformers' static caches are, where they are not plain full attention.
_KINDS = {
    "DummyLayer": "nothing of its own",
    "LinearAttentionLayer": "linear attention",
    "LinearAttentionAndStaticFullAttentionLayer": "linear and full attention in one layer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": "linear attention and a sliding window "
    "in one layer",
    "StaticIndexedLayer": "attention to tokens that an index picks",
    "StaticSlidingWindowLayer": "a sliding window",
}
#: Those of a size that does not grow with the tokens: nothing is lost by leaving them as they are.
_BOUNDED = _KINDS.keys() - {"LinearAttentionAndStaticFullAttentionLayer", "StaticIndexedLayer"}


class Owner:
    """The compiled model that uses a cache, if any, held weakly. A pickle does not know it."""

    def __init__(self, model: Any = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> Any:
        return None if self._model is None else self._model()

    def __deepcopy__(self, memo: Any) -> Owner:
        return self

    def __reduce__(self) -> Any:
        return Owner, ()


class SphericalCache(Cache):
    """A static cache of ``max_cache_len`` tokens, compressed.

    Full-attention layers are compressed; sliding layers are bounded already and stay as
    transformers makes them.

    Args:
        model_config: the model's config (``model.config``).
        max_cache_len: tokens of the longest row, prompt and generation together.
        config: a :class:`Config`; single settings may be given by name instead.

    Raises:
        ConfigError, UnsupportedError: before anything is allocated.
    """

    def __init__(
        self, model_config: Any, max_cache_len: int, config: Config | None = None, **overrides: Any
    ) -> None:
        self.config = make_config(config, **overrides)
        if (
            not isinstance(max_cache_len, int)
            or isinstance(max_cache_len, bool)
            or max_cache_len < 1
        ):
            raise ConfigError(f"max_cache_len={max_cache_len!r}: expected a positive integer.")
        if not hasattr(model_config, "get_text_config"):
            raise ConfigError(
                f"SphericalCache got {shown(model_config)} for a model's config. "
                "Pass model.config: SphericalCache(model.config, max_cache_len)."
            )
        layers = static_layers(model_config, max_cache_len)
        full = [n for n, layer in enumerate(layers) if type(layer) is StaticLayer]
        own = _layer_configs(model_config, len(layers))
        saved = None if self.config.frame is None else load_frames(self.config.frame)
        if saved is not None:
            check_frames(saved, model_config)
        for head_dim, layer_config in {_head_dim(own[n]): own[n] for n in full}.items():
            if head_dim is not None:
                _check_early(self.config, layer_config, head_dim, max_cache_len, saved)
        self.journal = Journal()
        siblings: list[SphericalLayer] = []
        for n in full:
            layers[n] = SphericalLayer(
                max_cache_len, self.config, n, siblings, self.journal, own[n], saved
            )
            siblings.append(layers[n])
        self.journal.dense_layers = len(layers) - len(full)
        self._max_cache_len = max_cache_len
        self.owner = Owner()
        super().__init__(layers=layers)

    @property
    def max_cache_len(self) -> int:
        """Tokens that fit."""
        return self._max_cache_len

    # ------------------------------------------------------------ what it costs

    @property
    def states(self) -> list[LayerState]:
        """The states of the compressed layers that have been allocated."""
        return [
            layer.state
            for layer in self.layers
            if isinstance(layer, SphericalLayer) and layer.state is not None
        ]

    @property
    def keepers(self) -> list[Keeper]:
        """The keepers of the pools, one for each shape that layers have."""
        return list({id(state.keeper): state.keeper for state in self.states}.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of every tensor this cache holds, those of layers left as they are included."""
        sizes: dict[int, int] = {}
        for state in self.states:
            own = [x for n, x in enumerate(state.tensors) if n not in SHARED and x.numel()]
            sizes |= {x.data_ptr(): x.nbytes for x in own}
        pools = sum(keeper.bytes for keeper in self.keepers)
        return sum(sizes.values()) + pools + self._dense_layer_bytes()

    @property
    def dense_bytes(self) -> int:
        """Bytes a dense static cache of the same shape would hold."""
        return sum(state.dense_bytes for state in self.states) + self._dense_layer_bytes()

    def _dense_layer_bytes(self) -> int:
        found: list[Any] = []
        for layer in self.layers:
            if not isinstance(layer, SphericalLayer):
                found += [getattr(layer, "keys", None), getattr(layer, "values", None)]
                for name in ("conv_states", "recurrent_states"):  # of linear attention
                    found += getattr(layer, name, {}).values()
        return sum(x.nbytes for x in found if x is not None)

    @property
    def bits_per_coordinate(self) -> float:
        """Bits per coordinate of the compressed region, every stored bit counted.

        The region is every token that has left the exact window, dropped ones too. Before there
        is one, what the tiers are made for.
        """
        if not self.states:
            raise CacheStateError("the cache has not seen a token yet: run the model first.")
        used = sum(keeper.used_bytes for keeper in self.keepers)
        coordinates = sum(keeper.coordinates for keeper in self.keepers)
        if coordinates:
            return 8 * used / coordinates
        first = self.states[0].layout
        return self.config.bits if first.tracked else first.rate(0)

    def raise_flags(self) -> None:
        """Raise what an accelerator could only flag since the last look."""
        for n, state in enumerate(self.states):
            state.raise_flags(f"compressed layer {n}")

    def summary(self) -> dict[str, Any]:
        """What is stored where, as plain numbers. Raises what an accelerator flagged."""
        self.raise_flags()
        first = self.states[0] if self.states else None
        seen = 0 if first is None else int(first.tensors.meta[:, :2].sum(1).max())
        return {
            "codec": self.config.codec,
            "retention": self.config.retention,
            "tier": None if first is None else tier_names(first.layout),
            "bits_per_coordinate": None if first is None else self.bits_per_coordinate,
            "compressed_layers": sum(isinstance(x, SphericalLayer) for x in self.layers),
            "dense_layers": sum(not isinstance(x, SphericalLayer) for x in self.layers),
            "max_cache_len": self.max_cache_len,
            "seen_tokens": seen,
            "stored_tokens": [] if first is None else first.tensors.meta[:, LENGTH].tolist(),
            **({} if first is None else first.keeper.summary()),
            "resident_bytes": self.resident_bytes,
            "dense_bytes": self.dense_bytes,
        }

    # ------------------------------------------------------------ rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row n be what row ``beam_idx[n]`` is: for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let every row be ``repeats`` rows that follow one another."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or not 0 < repeats <= 1 << 20:
            raise ConfigError(
                f"repeats={shown(repeats)}: expected a whole number from 1 to {1 << 20}."
            )
        if self.states:
            rows = torch.arange(self.states[0].batch, device=self.states[0].device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let row n be what row ``indices[n]`` is.

        Raises:
            ConfigError: the budget does not hold so many rows. Nothing is changed.
        """
        select_rows(self.layers, indices)

    def reset(self) -> None:
        """Forget every token; the next forward starts a new sequence."""
        for keeper in self.keepers:
            keeper.drop_held()
        super().reset()
        self.journal.commit()
        self.journal.spoiled = False


def static_layers(model_config: Any, max_cache_len: int) -> list[Any]:
    """The layers of transformers' own static cache for a model.

    Raises:
        UnsupportedError: there is no such cache, or none of its layers can be compressed.
    """
    name = type(model_config).__name__
    try:
        layers = list(StaticCache(config=model_config, max_cache_len=max_cache_len).layers)
    except KeyError as error:
        raise UnsupportedError(
            f"{name} has layers of type {error}, for which transformers has no static cache. Use "
            "the model's own cache."
        ) from error
    kinds = list(dict.fromkeys(type(layer).__name__ for layer in layers))
    if StaticLayer.__name__ in kinds:
        _refuse_shared(model_config)
        return layers
    growing = [kind for kind in kinds if kind not in _BOUNDED]
    if growing:
        raise UnsupportedError(
            f"{name} caches keys and values in layers that are not supported: {_words(growing)}. "
            "Only plain full attention is compressed. Use the model's own cache."
        )
    raise UnsupportedError(
        f"{name} has no full-attention layer with a KV cache, so there is nothing to compress: "
        f"{_words(kinds)}. Use the model's own cache."
    )


def _refuse_shared(model_config: Any) -> None:
    """Refuse full-attention layers that read what another layer has stored."""
    text = model_config.get_text_config(decoder=True)
    modes = getattr(text, "kv_sharing_modes", None) or []
    kinds = getattr(text, "layer_types", None) or []
    reading = [
        str(n)
        for n, (mode, kind) in enumerate(zip(modes, kinds, strict=False))
        if (mode, kind) == ("reuse", "full_attention")
    ]
    if reading:
        raise UnsupportedError(
            f"{type(model_config).__name__}: full-attention layers ({', '.join(reading)}) read the "
            "keys and values of an earlier layer, and a compressed layer serves one attention. "
            "Use the model's own cache."
        )


def _words(kinds: list[str]) -> str:
    return ", ".join(f"{x} ({_KINDS[x]})" if x in _KINDS else x for x in kinds)


def _layer_configs(model_config: Any, count: int) -> Any:
    """The config of each layer: where layers differ, the model's own does not say what they are."""
    text = model_config.get_text_config(decoder=True)
    return getattr(text, "per_layer_config", None) or [text] * count


def _head_dim(config: Any) -> int | None:
    """What one layer's config says, None if it says nothing."""
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and getattr(config, "hidden_size", None):
        head_dim = config.hidden_size // config.num_attention_heads
    return head_dim if isinstance(head_dim, int) else None


def refuse_several_shapes(model_config: Any) -> None:
    """Refuse a model whose layers are unlike one another: saved frames have one identity for all.

    Raises:
        UnsupportedError: it is one.
    """
    if getattr(model_config.get_text_config(decoder=True), "is_heterogeneous", False):
        raise UnsupportedError(
            f"{type(model_config).__name__} has layers of several shapes, which saved frames are "
            "not made for. Leave out frame=: frames are then fitted to every prompt."
        )


def check_frames(saved: SavedFrames, model_config: Any) -> None:
    """Refuse a model that saved frames do not fit, as far as its config says."""
    refuse_several_shapes(model_config)
    saved.check_config(model_config)


def _check_early(
    config: Config, layer_config: Any, head_dim: int, max_cache_len: int, saved: SavedFrames | None
) -> None:
    """Refuse at construction what the first forward would refuse of layers of ``head_dim``."""
    turned = rotary_plan(layer_config, head_dim) is not None
    layout = choose_layout(config, head_dim, max_cache_len, "float32", turned)
    if saved is not None and config.budget is None:
        for index, layer in saved.about["layers"].items():
            if layer["shape"][1] == head_dim:
                saved.layer(int(index), layer["shape"][0], layout)
