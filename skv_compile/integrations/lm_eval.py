"""The tasks of lm-eval, scored through a compressed cache.

    python -m skv_compile.integrations.lm_eval run --model skv \\
        --model_args pretrained=MODEL,bits=2.125 --tasks lambada_openai

or ``SkvLM(model, tokenizer=tokenizer, bits=2.125)`` for ``lm_eval.simple_evaluate``. Needs the
extra ``lm-eval``.

lm-eval's own ``hf`` runs a context and its continuation in one forward, which reads no cache. Here
the context fills one, and the continuation goes through it (``metrics.loglikelihood``). A context
of fewer tokens than sinks and recent window is exact: nothing of it is compressed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..api import compile
from ..cache.spherical import SphericalCache
from ..config import Config, make_config
from ..errors import ConfigError, shown
from ..metrics import loglikelihood
from .hf import room_for

Request = tuple[Any, list[int], list[int]]  # what it is remembered by; context; continuation


@register_model("skv")
class SkvLM(HFLM):
    """A causal model of transformers after :func:`skv_compile.compile`.

    Args:
        pretrained: as in lm-eval's ``hf``: a name, a folder, or a model, which is compiled.
        chunk: tokens of a continuation that go through the model at once.
        config: of the cache; single settings may be given by name instead.
        kwargs: settings of the cache, and arguments of ``hf``. Log-likelihoods are computed one
            request at a time, whatever ``batch_size`` is.

    Raises:
        ConfigError: an impossible setting, or ``chunk`` is no positive integer.
        UnsupportedError: a model that :func:`skv_compile.compile` refuses.
    """

    def __init__(
        self, pretrained: Any, *, chunk: int = 64, config: Config | None = None, **kwargs: Any
    ) -> None:
        names = {field.name for field in dataclasses.fields(Config)} & kwargs.keys()
        settings = make_config(config, **{name: kwargs.pop(name) for name in names})
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ConfigError(f"chunk={shown(chunk)}: expected a positive integer.")
        super().__init__(pretrained, backend="causal", **kwargs)
        self._chunk, self._settings = chunk, settings
        self._cache: SphericalCache | None = None
        compile(self.model, settings)

    def _empty_cache(self, tokens: int) -> SphericalCache:
        """A cache that so many tokens fit in; its memory is used again."""
        size = room_for(tokens)
        if self._cache is None or self._cache.max_cache_len != size:
            self._cache = SphericalCache(self.model.config, size, self._settings)
        else:
            self._cache.reset()
        return self._cache

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm or self.rank != 0):
            # Too long a context loses its beginning, as in ``hf``.
            ids = [*context, *continuation][-(self.max_length + 1) :]
            cache = self._empty_cache(len(ids))
            answer = loglikelihood(self.model, ids, len(continuation), cache, self._chunk)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            found.append(answer)
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
