"""``SphericalCache``: a Hugging Face Cache whose full-attention layers are compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from ..codec.rotary import rotary_plan
from ..codec.saved import SavedFrames, load_frames
from ..codec.tiers import choose_layout, tier_names
from ..config import Config, make_config
from ..errors import CacheStateError, ConfigError, UnsupportedError
from ..lowering.state import LENGTH
from ..retention.keeper import Keeper
from .journal import Journal
from .layer import SphericalLayer
from .rows import select_rows
from .state import SHARED, LayerState


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
        layers = list(StaticCache(config=model_config, max_cache_len=max_cache_len).layers)
        full = [n for n, layer in enumerate(layers) if type(layer) is StaticLayer]
        if not full:
            raise UnsupportedError(
                f"{type(model_config).__name__} has no full-attention layer with a KV cache, so "
                "there is nothing to compress. Use the model's own cache."
            )
        saved = None if self.config.frame is None else load_frames(self.config.frame)
        _check_early(self.config, model_config, max_cache_len, saved)
        self.journal = Journal()
        siblings: list[SphericalLayer] = []
        for n in full:
            layers[n] = SphericalLayer(
                max_cache_len, self.config, n, siblings, self.journal, model_config, saved
            )
            siblings.append(layers[n])
        self.journal.dense_layers = len(layers) - len(full)
        self._max_cache_len = max_cache_len
        self.owner: Any = None  # weak reference to the compiled model that uses this cache
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
        """Bytes of every tensor this cache holds, dense sliding layers included."""
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
        others = [x for x in self.layers if not isinstance(x, SphericalLayer) and x.is_initialized]
        return sum(x.keys.nbytes + x.values.nbytes for x in others)

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


def _check_early(
    config: Config, model_config: Any, max_cache_len: int, saved: SavedFrames | None
) -> None:
    """Refuse at construction what the first forward would refuse."""
    text = model_config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None and getattr(text, "hidden_size", None):
        head_dim = text.hidden_size // text.num_attention_heads
    if saved is not None:
        saved.check_config(model_config)
    if isinstance(head_dim, int):
        turned = rotary_plan(model_config, head_dim) is not None
        layout = choose_layout(config, head_dim, max_cache_len, "float32", turned)
        if saved is not None and config.budget is None:
            for index, layer in saved.about["layers"].items():
                if layer["shape"][1] == head_dim:
                    saved.layer(int(index), layer["shape"][0], layout)
