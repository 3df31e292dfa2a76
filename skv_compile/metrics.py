"""How far a model with a compressed cache is from the exact one.

The measurement has two halves: :func:`score_continuation` runs a prefix and then its
continuation through a cache, so that every scored token reads the compressed past;
:func:`compare` turns two sets of logits into one :class:`Comparison`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from typing import Any

import torch

from .codec.tiers import CALIBRATE_TOKENS

#: Rows compared at once: 64 rows of a 150k vocabulary are 77 MB in float64.
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Distance of one set of logits from the exact one, over ``tokens`` positions."""

    tokens: int
    #: Mean over positions of KL(exact || other) over the whole vocabulary, in nats.
    kl_mean: float
    #: Standard error of that mean (positions taken as independent).
    kl_stderr: float
    #: The largest KL of a single position.
    kl_max: float
    #: Fraction of positions where both put the same token first.
    same_top1: float
    #: Change of perplexity on the targets, in percent of the exact perplexity.
    delta_ppl: float

    def to_dict(self) -> dict[str, float | int]:
        """The fields as plain numbers, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl_mean:.5f} ± {self.kl_stderr:.5f} nats (max {self.kl_max:.4f}), "
            f"same top-1 {100 * self.same_top1:.2f} %, perplexity {self.delta_ppl:+.2f} %, "
            f"{self.tokens} tokens"
        )


@torch.no_grad()
def score_continuation(
    model: torch.nn.Module, ids: torch.Tensor, prefix: int, cache: Any
) -> torch.Tensor:
    """Logits of the tokens after ``prefix``, computed through ``cache``.

    ``ids`` is ``[T]`` or ``[1, T]``. The first ``prefix`` tokens fill the cache; the
    remaining ``T - prefix`` go through the model in one forward. Row ``i`` of the result
    ``[T - prefix, vocabulary]`` was computed at position ``prefix + i`` and predicts the
    token at ``prefix + i + 1``.
    """
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"score_continuation takes one sequence, got ids of {tuple(ids.shape)}")
    if not 0 < prefix < ids.shape[1]:
        raise ValueError(f"prefix must lie between 1 and {ids.shape[1] - 1}, got {prefix}")
    fill: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        fill["logits_to_keep"] = 1  # the prefix's own logits are not needed
    model(ids[:, :prefix], **fill)
    out = model(ids[:, prefix:], past_key_values=cache, use_cache=True)
    return out.logits[0]


@torch.no_grad()
def loglikelihood(
    model: torch.nn.Module, ids: list[int], scored: int, cache: Any, chunk: int
) -> tuple[float, bool]:
    """Log-likelihood in nats of the last ``scored`` of ``ids``, computed through ``cache``, and
    whether every one of them is the model's first choice.

    What comes before them fills the cache in one forward, as a prompt does; they follow in chunks
    of ``chunk`` tokens, each of which reads what the cache has made of all before. Where there is
    little before them, the first ``CALIBRATE_TOKENS`` go together: frames are fitted to that many.

    Raises:
        ValueError: nothing is scored, or nothing comes before it.
        FloatingPointError: a logit is NaN or infinite.
    """
    if not 0 < scored < len(ids) or chunk < 1:
        raise ValueError(
            f"loglikelihood needs tokens to score and one before them, in chunks of at least one; "
            f"got {scored} of {len(ids)}, chunk={chunk}"
        )
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    end, first = len(ids) - 1, len(ids) - 1 - scored  # of what the logits are of
    start = min(end, max(first, CALIBRATE_TOKENS))
    total, greedy = 0.0, True
    for begin, stop in _parts(start, end, chunk):
        logits = model(tokens[:, begin:stop], past_key_values=cache, use_cache=True).logits[0]
        rows = logits[max(first - begin, 0) :]
        if len(rows) == 0:
            continue
        wanted = tokens[0, stop - len(rows) + 1 : stop + 1]
        found = _finite(rows, "the model's", stop - len(rows)).log_softmax(-1)
        total += float(found.gather(1, wanted[:, None]).sum())
        greedy &= bool((found.argmax(-1) == wanted).all())
    return total, greedy


def _parts(start: int, end: int, chunk: int) -> list[tuple[int, int]]:
    """[0, start), then chunks up to ``end``."""
    cuts = [0, *range(start, end, chunk), end]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


@torch.no_grad()
def compare(
    exact_logits: torch.Tensor, other_logits: torch.Tensor, targets: torch.Tensor
) -> Comparison:
    """Compare two sets of logits ``[N, vocabulary]`` that predict ``targets`` ``[N]``.

    Everything is accumulated in float64, :data:`CHUNK` rows at a time. Raises
    :class:`FloatingPointError` when a logit is NaN or infinite: a broken model must not
    come out as a number.
    """
    rows = _check(exact_logits, other_logits, targets)
    kl_parts: list[torch.Tensor] = []
    same = 0
    nll_exact = nll_other = 0.0
    for start in range(0, rows, CHUNK):
        part = slice(start, min(start + CHUNK, rows))
        exact = _finite(exact_logits[part], "exact", start)
        other = _finite(other_logits[part].to(exact.device), "other", start)
        wanted = targets[part].to(exact.device)[:, None]
        same += int((exact.argmax(-1) == other.argmax(-1)).sum())
        exact = exact.log_softmax(-1)
        other = other.log_softmax(-1)
        nll_exact -= float(exact.gather(1, wanted).sum())
        nll_other -= float(other.gather(1, wanted).sum())
        # In-place: difference of the log-probabilities, weighted by the exact probability.
        other.neg_().add_(exact).mul_(exact.exp_())
        kl_parts.append(other.sum(-1).clamp_(min=0.0).cpu())
    kl = torch.cat(kl_parts)
    spread = float(kl.std(correction=1)) if rows > 1 else 0.0
    return Comparison(
        tokens=rows,
        kl_mean=float(kl.mean()),
        kl_stderr=spread / math.sqrt(rows),
        kl_max=float(kl.max()),
        same_top1=same / rows,
        delta_ppl=100.0 * math.expm1((nll_other - nll_exact) / rows),
    )


def _check(exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> int:
    """The common number of rows, or an error that shows the three shapes."""
    if exact.dim() != 2 or exact.shape != other.shape or targets.shape != exact.shape[:1]:
        raise ValueError(
            "compare takes two logits [tokens, vocabulary] and targets [tokens], got "
            f"{tuple(exact.shape)}, {tuple(other.shape)} and {tuple(targets.shape)}"
        )
    if exact.shape[0] == 0:
        raise ValueError("compare needs at least one token")
    if bool((targets < 0).any()) or bool((targets >= exact.shape[1]).any()):
        raise ValueError(f"targets must lie between 0 and {exact.shape[1] - 1}")
    return exact.shape[0]


def _finite(logits: torch.Tensor, name: str, start: int) -> torch.Tensor:
    """``logits`` in float64, or an error that names the first position that is not finite."""
    bad = ~torch.isfinite(logits).all(-1)
    if bool(bad.any()):
        position = start + int(bad.nonzero()[0, 0])
        raise FloatingPointError(f"the {name} logits are not finite at position {position}")
    return logits.double()
