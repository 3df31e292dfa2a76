"""A decorator: every instance of a class keeps its cache compressed."""

from __future__ import annotations

import torch
from own_module import Attention

import skv_compile as skv


@skv.compile(codec="identity")  # exact: the tool that tells a wiring bug from a coding error
class ExactAttention(Attention):
    pass


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    compressed = ExactAttention().eval()
    plain = Attention().eval()
    plain.load_state_dict(
        {k: v for k, v in compressed.state_dict().items() if "cache" not in k}, strict=False
    )

    x = torch.randn(1, 300, 256)
    worst = 0.0
    for start, stop in ((0, 299), (299, 300)):
        position = torch.arange(start, stop)
        got, want = compressed(x[:, start:stop], position), plain(x[:, start:stop], position)
        worst = max(worst, (got - want).abs().max().item())
    print("largest difference to the dense module:", worst)


if __name__ == "__main__":
    main()
