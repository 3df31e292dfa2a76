"""One compressed layer of a Hugging Face cache: traced, eager, and what is done between steps."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..codec.rotary import rotary_plan
from ..codec.saved import SavedFrames
from ..codec.tiers import tier_names
from ..config import MOST_TOKENS, Config
from ..errors import CacheStateError, CapacityError, ConfigError, UnsupportedError, shown
from ..lowering.ops import slots
from ..lowering.state import FLAGS
from ..retention.keeper import Keeper
from . import phantom
from .check import check_pair, check_rows
from .home import allocating, make_keeper
from .journal import Journal
from .state import LayerState
from .view import CachedTensor, Pending


class SphericalLayer(CacheLayerMixin):
    """One full-attention layer. ``keys`` and ``values`` are phantoms; the state rides on them."""

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        max_cache_len: int,
        config: Config,
        index: int,
        siblings: list[SphericalLayer],
        journal: Journal,
        model_config: Any,
        saved: SavedFrames | None = None,
    ) -> None:
        super().__init__()
        self.max_cache_len, self.config = max_cache_len, config
        self.index, self.siblings, self.journal = index, siblings, journal
        self.model_config, self.saved = model_config, saved
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self.state: LayerState | None = None
        self.signature = ""
        self._guessed = False  # allocated for the shapes of another layer, nothing stored yet
        self._shape: tuple[int, ...] = ()
        self._kind: tuple = ()  # what layers that share a pool have in common
        self._read: tuple[int, int] | None = None  # see _seen

    @property
    def _before(self) -> list[SphericalLayer]:
        return self.siblings[: self.siblings.index(self)]

    @property
    def where(self) -> str:
        return f"cache layer {self.index}"

    # ------------------------------------------------------------ set-up

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes, dtype and device of the first keys and values."""
        check_pair(self.where, key_states, value_states)
        batch, heads, _, head_dim = key_states.shape
        if not 0 < batch * heads <= MOST_TOKENS or key_states.is_meta:
            raise UnsupportedError(
                f"{self.where}: a compressed layer needs rows, kv heads and a device that holds "
                f"numbers, and was given {list(key_states.shape)} on {key_states.device}. Run the "
                "model on a prompt of at least one row."
            )
        rows = [x.batch_size for x in self.siblings if x.is_initialized and not x._guessed]
        check_rows(self.where, batch, rows)
        shape = (batch, heads, head_dim, self.max_cache_len, key_states.dtype, key_states.device)
        turn = rotary_plan(self.model_config, head_dim)
        group = group_of(self.model_config)
        saved = None if self.saved is None else partial(self.saved.layer, self.index)
        with allocating(self.max_cache_len):
            keeper = self._keeper(shape, group, turn is not None)
            state = LayerState(
                self.config, *shape, turn=turn, saved=saved, group=group, keeper=keeper
            )
        self.adopt(state)

    def _keeper(self, shape: tuple, group: int, turned: bool) -> Keeper:
        """The keeper of the layers that share a pool: all siblings, if they are of this shape."""
        budget, count = self.config.budget_bytes, len(self.siblings)
        for other in self.siblings:
            if other.state is not None and not self.is_initialized:
                keeper = other.state.keeper
                joins = other._kind == shape and len(keeper.states) < keeper.pool.layers
                if joins:
                    return keeper
        waiting = [x for x in self.siblings if x.state is None]
        alone = len(waiting) < count or self.is_initialized
        layers = 1 if alone else count
        part = None if budget is None else budget * layers // count
        batch, heads, dim, tokens, dtype, device = shape
        return make_keeper(
            self.config, layers, batch, heads, dim, tokens, dtype, device, group, part, turned
        )

    def adopt(self, state: LayerState) -> None:
        """Stand for this state from now on."""
        self.state, self.signature, self._read = state, state.signature, None
        self._guessed, self._shape = False, (state.batch, state.heads, state.layout.head_dim)
        self.dtype, self.device, self.batch_size = state.dtype, state.device, state.batch
        self._kind = (*self._shape, self.max_cache_len, state.dtype, state.device)
        self.keys, self.values = phantom.make(state), phantom.make(state)
        self.cumulative_length = self.cumulative_length.to(state.device)
        torch._dynamo.mark_static_address(self.cumulative_length)
        state.counter = self.cumulative_length
        self.is_initialized = True

    def _fits(self, k: Tensor) -> bool:
        """Whether there is a state for keys like these, or one that has to refuse them."""
        if not self.is_initialized:
            return False
        return not self._guessed or self._shape == (*k.shape[:2], k.shape[3])

    # ------------------------------------------------------------ the two ways in

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, H, T, D]; return what attention reads.

        Traced, this is the plain spelling of a static cache, which the ``skv`` backend
        rewrites. Eagerly, the returned tensors answer ``scaled_dot_product_attention``.
        """
        if not torch.compiler.is_compiling():
            return self._eager(key_states, value_states)
        tokens = key_states.shape[2]
        if not self._fits(key_states):
            return _first_update(self, key_states, value_states)
        differs = self._shape != (*key_states.shape[:2], key_states.shape[3])
        if differs or (torch.is_grad_enabled() and key_states.requires_grad):
            return _refuse(self, key_states, value_states)
        if not _backend_is_ours():
            return _dense_update(self, key_states, value_states)
        # Dynamo guards on what it reads: another codec, tier or length is another graph.
        if self.signature == "":
            raise CacheStateError("a compressed layer without a state")
        position = slots(self.cumulative_length, tokens)
        self.cumulative_length.add_(tokens)
        self.keys.index_copy_(2, position, key_states)
        self.values.index_copy_(2, position, value_states)
        return self.keys, self.values

    def _eager(self, k: Tensor, v: Tensor) -> tuple[CachedTensor, CachedTensor]:
        """What attention reads. An error undoes the forward."""
        if self is self.siblings[0]:
            self._begin()
        try:
            check_pair(self.where, k, v)
            if not self._fits(k):
                self.lazy_initialization(k, v)
            return self._pending(k, v, k.shape[2])
        except BaseException:
            self.journal.rollback()
            raise

    def _pending(self, k: Tensor, v: Tensor, tokens: int) -> tuple[CachedTensor, CachedTensor]:
        state = self.state
        assert state is not None
        expected = (state.batch, state.heads, tokens, state.layout.head_dim)
        if tuple(k.shape) != expected or k.dtype != state.dtype or k.device != state.device:
            found = f"{list(k.shape)} {k.dtype} on {k.device}"
            raise CacheStateError(
                f"{self.where} holds batch {state.batch}, {state.heads} kv heads of dim "
                f"{state.layout.head_dim}, {state.dtype} on {state.device}, and was given {found}. "
                "A cache serves one model and one batch: make a new SphericalCache."
            )
        # One token is not waited for on an accelerator; what is wrong is flagged there.
        seen = self._seen() if tokens > 1 or state.device.type == "cpu" else 0
        if seen + tokens > self.max_cache_len:
            raise CapacityError(
                f"{seen + tokens} tokens do not fit: the cache was made for "
                f"{self.max_cache_len}. Make it with a larger max_cache_len, or shorten the prompt."
            )
        if all(x.state is None or x.state.keeper is not state.keeper for x in self._before):
            state.keeper.tick(tokens)  # the first of its pool in this forward
        self.journal.record(state, tokens)
        position = torch.arange(tokens, device=k.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        begins, ends = tokens > 1 and seen == 0, self is self.siblings[-1]
        pending = Pending(state, self.journal, k, v, position, self.where, begins, ends)
        return (
            CachedTensor.make(self.keys, pending, 0),
            CachedTensor.make(self.values, pending, 1),
        )

    def dense_update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`update` for code that cannot read codes: dense keys and values."""
        keys, _ = self._eager(k, v)
        return keys._pending.dense()

    def _begin(self) -> None:
        """A new forward: the last one stands if it reached every layer, else it is undone."""
        if self.journal.spoiled:
            raise CacheStateError(
                "An earlier forward failed halfway, and the sliding layers of this cache cannot be "
                "put back. Call cache.reset() and run the prompt again."
            )
        self.journal.begin()
        self.take_back()
        self.journal.forget()

    def take_back(self) -> None:
        """Undo a forward that did not reach every layer, or whose attention never came.

        Raises:
            CacheStateError: there was one.
        """
        self.journal.check()
        if self.state is not None and self.device.type != "cpu":
            return  # nothing is journalled there, and reading would wait
        # Nobody confirmed the last forward: then layers that it should have allocated count too.
        open_ = self.journal.open
        layers = [x for x in self.siblings if x.is_initialized or open_]
        seen = {int(x.cumulative_length) for x in layers}
        if open_:
            states = [x.state for x in layers if x.state is not None]
            seen |= {int(s.tensors.meta[0, :2].sum()) for s in states}
        if len(seen) > 1:
            self.journal.rollback()
            raise CacheStateError(
                "An earlier forward failed halfway. What it had stored has been taken back: "
                "the cache is as it was before that forward. Run this one again."
            )

    def _seen(self) -> int:
        """Tokens that this layer has seen, as its counter says. Raises what a device flagged.

        Reading waits for the device, so the first layer to ask reads for those after it. What it
        read for a layer is used once, and not when graphs have run since.

        Raises:
            CacheStateError: a flag, or layers that have seen different numbers of tokens.
        """
        assert self.state is not None
        graphs = self.state.keeper.graphs
        if self._read is None or self._read[0] != graphs:
            own = self.siblings.index(self)
            known = [x for x in self.siblings[own:] if x.state is not None]
            states = [x.state for x in known if x.state is not None]
            counts = torch.stack([x.cumulative_length.to(self.device) for x in known])
            flags = torch.stack([s.tensors.meta[:, FLAGS].amax().to(self.device) for s in states])
            seen, wrong = torch.stack([counts, flags]).tolist()
            for layer, state, n, bad in zip(known, states, seen, wrong, strict=True):
                layer._read = state.keeper.graphs, n
                if bad:
                    state.raise_flags(layer.where)
            if own == 0 and len(set(seen)) > 1:
                raise CacheStateError(
                    "An earlier forward failed halfway: its first layers have stored tokens that "
                    "the others have not. Call cache.reset() and run the prompt again."
                )
        assert self._read is not None
        seen_here, self._read = self._read[1], None
        return seen_here

    # ------------------------------------------------------------ the layer protocol

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Forget every token. Memory, addresses and compiled graphs stay."""
        self._read = None
        if self.state is not None:
            self.state.reset()
        self.cumulative_length.zero_()
        self.journal.commit()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, or keep the first ``tokens_to_remove``."""
        try:
            tokens_to_remove = operator.index(tokens_to_remove)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"crop({shown(tokens_to_remove)}): expected an integer, such as -3 to remove the "
                "last 3 tokens."
            ) from error
        if self.state is None:
            return
        if self is self.siblings[0]:
            self.take_back()
        self._read = None
        seen = int(self.cumulative_length)
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if remove > seen:
            raise CacheStateError(
                f"crop({tokens_to_remove}): the cache has seen {seen} tokens. Remove at most those."
            )
        if remove == seen:
            self.reset()
        elif remove:
            self.state.crop(remove)
            self.cumulative_length.sub_(remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UnsupportedError(
            "rows of one compressed layer cannot be selected alone: its pages are shared. Call "
            "the method of the SphericalCache."
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices

    def offload(self) -> None:
        raise UnsupportedError(
            "SphericalCache does not offload: a phantom has nothing to move. "
            "Use fewer bits instead, or a dense cache with offloading."
        )

    prefetch = offload

    def __repr__(self) -> str:
        tier = tier_names(self.state.layout) if self.state is not None else "not allocated yet"
        return f"SphericalLayer({tier}, max_cache_len={self.max_cache_len})"


def group_of(model_config: Any) -> int:
    """Query heads of a kv head, as a model's config has them."""
    text = model_config.get_text_config(decoder=True)
    queries = getattr(text, "num_attention_heads", None)
    keys = getattr(text, "num_key_value_heads", None) or queries
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        keys = 1  # Falcon has no other word for it
    if isinstance(queries, int) and isinstance(keys, int) and keys and queries % keys == 0:
        return queries // keys
    return 1


@torch._dynamo.assume_constant_result
def _backend_is_ours() -> bool:
    """While tracing: is the graph for the ``skv`` backend?

    Where Dynamo does not tell, yes: a graph that is not rewritten raises in ``skv::slots``.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        compiler = InstructionTranslator.current_tx().output.compiler_fn
    except Exception:
        return True
    seen = 0
    while compiler is not None and seen < 16:
        if (
            getattr(compiler, "_skv_backend", False)
            or getattr(compiler, "compiler_name", "") == "skv"
        ):
            return True
        inner = getattr(compiler, "_torchdynamo_orig_backend", None)
        inner = inner or getattr(compiler, "compiler_fn", None) or getattr(compiler, "func", None)
        compiler, seen = inner, seen + 1
    return False


@torch.compiler.disable(
    reason="a SphericalCache refuses keys of another shape than it holds, and keys that require a "
    "gradient: give each model and batch its own cache, and call the model under torch.no_grad()"
)
def _refuse(layer: SphericalLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Say at run time, in the words of the eager path, what a traced forward does wrong."""
    return layer.dense_update(k, v)


@torch.compiler.disable(
    reason="a SphericalCache in a graph of another backend works layer by layer, outside the "
    "graph. Compile with backend='skv', or call skv.compile(model)"
)
def _dense_update(layer: SphericalLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return layer.dense_update(k, v)


@torch.compiler.disable(
    reason="a SphericalCache allocates on its first forward. Call cache.early_initialization(...) "
    "or skv.compile(model) to have it in one graph from the start"
)
def _first_update(layer: SphericalLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A first forward that is being compiled: allocate all layers, so that only one is outside."""
    for other in layer.siblings:
        if other is layer or not other.is_initialized:
            other.lazy_initialization(k[:, :, :0], v[:, :, :0])
            other._guessed = other is not layer
    dense = layer.dense_update(k, v)
    for tensor in dense:
        tensor._skv_first_forward = True
    return dense
