"""``skv.compile`` on a transformers model: generate() and forward(), in place."""

from __future__ import annotations

import functools
import inspect
import logging
import textwrap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from ..backend import SkvBackend, refuse_gradients
from ..cache.spherical import Owner, SphericalCache, check_frames, static_layers
from ..codec.saved import check_model, load_frames
from ..config import Config
from ..errors import CacheStateError, SkvError, UnsupportedError

log = logging.getLogger(__name__)

#: Attention implementations that the pass can see into: a call of
#: ``scaled_dot_product_attention``, or products and a softmax.
READABLE = ("sdpa", "eager")

#: Caches made by generate() are rounded up to this many tokens, so that prompts of similar
#: length share one compiled graph.
LENGTH_STEP = 256

RECOMPILE_LIMIT = 256


def is_hf_model(target: object) -> bool:
    """Whether ``target`` is a transformers model that can generate."""
    from transformers import PreTrainedModel

    return isinstance(target, PreTrainedModel)


class Attachment:
    """What ``skv.compile`` adds to one model.

    Prefill runs eagerly (one forward, any length); single-token forwards on a
    ``SphericalCache`` run compiled with the ``skv`` backend. Where that cannot be, a warning says
    so once, and each layer is made dense for its attention; ``strict`` makes it an error.
    """

    def __init__(self, model: Any, config: Config, mode: str | None, dump: Any = None) -> None:
        check_model_class(model)
        if config.frame is not None:
            check_frames(load_frames(config.frame), model.config)
            check_model(load_frames(config.frame), model)
        self.config, self.mode, self.dump = config, mode, dump
        SkvBackend(config=config, mode=mode)  # refuse a wrong mode now
        self.before = {n: model.__dict__[n] for n in ("forward", "generate") if n in model.__dict__}
        self._model = weakref.ref(model)
        self._forward = model.forward
        self._generate = getattr(model, "generate", None)
        self._compiled: Any = None
        self._cache: SphericalCache | None = None
        self._busy = threading.Lock()  # held by the generate() that uses that cache
        self._dense: dict[str, str] = {}  # attention implementation -> why it is left dense
        self._readable(model)

    # ------------------------------------------------------------ forward

    def compiled(self, device: torch.device) -> Any:
        """The compiled forward, made once."""
        if self._compiled is None:
            mode = self.mode
            if mode is None:
                mode = "reduce-overhead" if device.type == "cuda" else "default"
            options = {"dump": self.dump}
            backend = SkvBackend(config=self.config, mode=mode, options=options)
            self._compiled = torch.compile(self._forward, backend=backend, fullgraph=True)
        return self._compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, SphericalCache) or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        model = self._model()
        assert model is not None
        self._refuse(model, cache)
        rows, tokens = _shape(model, args, kwargs)
        if cache.is_initialized and cache.batch_size != rows:
            raise CacheStateError(
                f"the cache holds a batch of {cache.batch_size} rows and was given {rows}. "
                "A cache serves one batch: make a new SphericalCache."
            )
        cache.journal.begin()
        try:
            readable = self._readable(model)
            if tokens == 1 and cache.is_initialized and readable and self._wants(model, kwargs):
                out = self._step(model, *args, **kwargs)
            else:
                out = self._forward(*args, **kwargs)
            cache.journal.commit()
            return out
        except BackendCompilerFailed as error:
            raise own_error(error) from None
        except BaseException:
            cache.journal.rollback()
            raise

    def _step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The compiled forward, or the plain one where attention by hand cannot be rewritten."""
        try:
            # Every length and batch size is a graph of its own, and a user may have many.
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return self.compiled(model.device)(*args, **kwargs)
        except TorchDynamoException as error:  # of tracing or compiling: nothing has run
            own, name = own_error(error), attention_of(model)
            mistaken = isinstance(own, SkvError) and not isinstance(own, UnsupportedError)
            if name == "sdpa" or mistaken or self.config.strict:
                raise
            self._leave_dense(model, name, f"cannot be compiled ({_shortened(own)})")
        return self._forward(*args, **kwargs)

    def _readable(self, model: Any) -> bool:
        """Whether the pass may rewrite this model's attention. If it may not, it is said once."""
        name = attention_of(model)
        if name not in READABLE and name not in self._dense:
            self._leave_dense(model, name, "is not one that the pass can rewrite")
        return name not in self._dense

    def _wants(self, model: Any, kwargs: dict) -> bool:
        """Whether a forward wants nothing that only attention by hand gives."""
        wanted = kwargs.get("output_attentions") or model.config.output_attentions
        if wanted and "weights" not in self._dense:
            self._leave_dense(model, "weights", "is asked for its weights (output_attentions)")
        return not wanted

    def _leave_dense(self, model: Any, key: str, why: str) -> None:
        """Warn that forwards are not compiled, or raise if ``strict``. ``key``: once for each."""
        name = attention_of(model)
        text = f"{type(model).__name__}: attention {name!r} {why}."
        if key == "weights":
            remedy = "Leave output_attentions out."
        elif name != "sdpa" and getattr(model, "_supports_sdpa", False):
            remedy = 'Load the model with attn_implementation="sdpa".'
        else:
            remedy = "skv.explain(model, input_ids) says more."
        if self.config.strict:
            raise UnsupportedError(f"{text} strict=True asks for compiled attention. {remedy}")
        self._dense[key] = why
        more = ""
        if self.config.retention != "none":
            more = f" That needs retention='none': {self.config.retention!r} may drop tokens."
        log.warning(
            f"{text} Such forwards run uncompiled, and each layer is made dense for the length of "
            f"its own attention.{more} {remedy}"
        )

    def _refuse(self, model: Any, cache: SphericalCache) -> None:
        if model.training:
            raise UnsupportedError(
                f"{type(model).__name__} is in training mode; a compressed cache is for inference. "
                "Call model.eval() first."
            )
        refuse_gradients(model.parameters())
        owner = cache.owner()
        if owner is None:
            cache.owner = Owner(model)
        elif owner is not model:
            raise CacheStateError(
                f"this cache belongs to another model ({type(owner).__name__}). "
                "Make a SphericalCache for each model."
            )

    # ------------------------------------------------------------ generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """generate() with a spherical cache unless another cache was asked for."""
        model = self._model()
        assert model is not None
        assert self._generate is not None
        second = args[1] if len(args) > 1 else None
        generation = kwargs.get("generation_config") or second or model.generation_config
        chosen = kwargs.get("cache_implementation") or generation.cache_implementation
        use_cache = kwargs.get("use_cache", generation.use_cache)
        own = kwargs.get("past_key_values") is None and chosen is None and use_cache is not False
        # A generate() of another thread, or inside of this one, has the kept cache: this one gets
        # a cache that is not kept.
        keeps = own and self._busy.acquire(blocking=False)
        try:
            if own:
                kwargs["past_key_values"] = self._cache_for(model, generation, args, kwargs, keeps)
            cache = kwargs.get("past_key_values")
            if isinstance(cache, SphericalCache):
                kwargs.setdefault("disable_compile", True)  # forward() compiles by itself
            out = self._generate(*args, **kwargs)
            if isinstance(cache, SphericalCache):
                cache.raise_flags()
            return out
        finally:
            if keeps:
                self._busy.release()

    def _cache_for(
        self, model: Any, generation: Any, args: tuple, kwargs: dict, keeps: bool
    ) -> SphericalCache:
        """A cache that fits a call: the last one if it does, where ``keeps`` lets it be kept."""

        def setting(name: str) -> Any:
            return kwargs.get(name, getattr(generation, name, None))

        prompt = next(
            (
                x
                for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
                if x is not None
            ),
            None,
        )
        embeds = kwargs.get("inputs_embeds")
        rows, length = 1, 1
        if prompt is not None:
            rows, length = prompt.shape[:2]
        if embeds is not None:
            rows, length = embeds.shape[0], max(length, embeds.shape[1])
        new = setting("max_new_tokens")
        total = length + new if new is not None else max(setting("max_length") or 0, length + 20)
        total += setting("prompt_lookup_num_tokens") or 0  # guesses reach beyond the last token
        rows *= max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        total = room_for(total)
        if not keeps:
            return SphericalCache(model.config, total, self.config)
        old, returned = self._cache, setting("return_dict_in_generate")
        if old is not None and not returned and _same(old, total, rows, model):
            old.reset()
            return old
        cache = SphericalCache(model.config, total, self.config)
        self._cache = None if returned else cache
        return cache

    @property
    def cache(self) -> SphericalCache | None:
        """The cache of the last generate() call that made its own."""
        return self._cache


class Door:
    """A model's method that goes through its attachment."""

    def __init__(self, method: Any, original: Any) -> None:
        functools.update_wrapper(self, original)
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise UnsupportedError(
            "a model after skv.compile cannot be copied or pickled: the copy would run the "
            "original's weights. Copy or save it before skv.compile, or save its state_dict()."
        )

    def __reduce__(self) -> Any:
        return self.__deepcopy__(None)


def attach(model: Any, config: Config, mode: str | None, dump: Any = None) -> Any:
    """Let ``model`` use spherical caches; a second call replaces the settings of the first.
    ``dump``: of the backend."""
    if getattr(model, "_skv", None) is not None:
        detach(model)
    attachment = Attachment(model, config, mode, dump)
    model.forward = Door(attachment.forward, attachment._forward)
    if attachment._generate is not None:
        model.generate = Door(attachment.generate, attachment._generate)
    model._skv = attachment
    return model


def detach(model: Any) -> Any:
    """Undo :func:`attach`."""
    before = model._skv.before
    for name in ("forward", "generate", "_skv"):
        model.__dict__.pop(name, None)
    model.__dict__.update(before)
    return model


def check_model_class(model: Any) -> None:
    """Refuse a model whose generate() does not take a cache, or takes only one of its own.

    Raises:
        UnsupportedError: with the reason.
    """
    cls = type(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{cls.__name__} is an encoder-decoder model; only decoder-only models are "
            "supported. Nothing was changed."
        )
    static_layers(model.config, LENGTH_STEP)
    if "past_key_values" not in inspect.signature(cls.forward).parameters:
        raise UnsupportedError(
            f"{cls.__name__}.forward() takes no past_key_values, so there is no KV cache to "
            "compress. If it has a language model inside, compile that one. Nothing was changed."
        )
    takes_caches = getattr(cls, "_supports_default_dynamic_cache", None)
    if takes_caches is not None and not takes_caches():
        raise UnsupportedError(
            f"{cls.__name__} works with a cache class of its own and no other. Nothing was changed."
        )


def attention_of(model: Any) -> str:
    """The attention implementation of a model's decoder."""
    text = model.config.get_text_config(decoder=True)
    return text._attn_implementation or model.config._attn_implementation or "eager"


def own_error(error: BaseException) -> BaseException:
    """Our error inside one of torch.compile's, or that one itself."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, SkvError) else error


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise our own error where torch.compile wraps it in one of its."""
    try:
        yield
    except BackendCompilerFailed as error:
        raise own_error(error) from None


def _shortened(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0] if lines else repr(error), 500, placeholder=" ...")


def room_for(tokens: int) -> int:
    """Tokens of a cache that so many fit in: a multiple of :data:`LENGTH_STEP`."""
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


def _same(cache: SphericalCache, total: int, rows: int, model: Any) -> bool:
    """Whether a cache fits this call, so that its memory and graphs can be used again."""
    states = cache.states
    return (
        (cache.max_cache_len, cache.batch_size) == (total, rows)
        and bool(states)
        and (states[0].dtype, states[0].device) == (model.dtype, model.device)
    )


def _shape(model: Any, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Rows of this forward, and the tokens each brings."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return tuple(kwargs[name].shape[:2])
    if args and isinstance(args[0], torch.Tensor):
        return tuple(args[0].shape[:2])
    names = list(inspect.signature(type(model).forward).parameters)
    raise SkvError(f"no input_ids or inputs_embeds among the arguments; forward takes {names}.")
