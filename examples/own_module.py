"""Your own module: attention over registered cache buffers, compiled with backend="skv".

Nothing of skv_compile is imported. After the first step the dense buffers are gone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(
        self, dim: int = 256, heads: int = 4, kv_heads: int = 2, slots: int = 4096
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(dim, dim)
        cache = torch.zeros(1, kv_heads, slots, self.head_dim)
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", cache.clone())
        self.register_buffer("causal", torch.ones(slots, slots, dtype=torch.bool).tril())

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        self.k_cache[:, :, position] = k
        self.v_cache[:, :, position] = v
        mask = self.causal[position][None, None]
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    module = Attention().eval()
    before = module.k_cache.untyped_storage().nbytes()
    module.compile(backend="skv", options={"bits": 4.2})

    module(torch.randn(1, 1000, 256), torch.arange(1000))
    for step in range(1000, 1010):
        module(torch.randn(1, 1, 256), torch.tensor([step]))
    print("bytes of the key buffer:", before, "->", module.k_cache.untyped_storage().nbytes())


if __name__ == "__main__":
    main()
