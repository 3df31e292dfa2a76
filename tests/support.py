"""Small models, padded batches and a plain greedy loop, for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from skv_compile.cache.state import LayerState
from skv_compile.config import Config

transformers.logging.set_verbosity_error()

#: How far coded attention of the CPU kernels may take float32 logits of order 1, through the layers
#: of a tiny model: they round queries and weights to 16 bits.
NATIVE = 2e-3

MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "neox", "phi")
VOCAB = 128

#: Small pages and window, so that a short prompt fills several pages; every token in one tier.
SMALL = {"sinks": 4, "recent": 12, "page_tokens": 8, "retention": "none"}


def tiny(name: str, layers: int = 2, **kw: Any) -> Any:
    """A random model of 2 layers. Its weights are large enough for peaked attention."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        **kw,
    }
    many = {k: v for k, v in sizes.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(**sizes)
    elif name == "qwen2":
        config = Qwen2Config(**sizes)
    elif name == "qwen3":
        config = Qwen3Config(**sizes, head_dim=16)
    elif name == "mistral":
        config = MistralConfig(**sizes, sliding_window=None)
    elif name == "gemma3":
        types = ["sliding_attention", "full_attention"] * (layers // 2)
        config = Gemma3TextConfig(**sizes, head_dim=16, sliding_window=16, layer_types=types)
    elif name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=layers,
            n_head=4,
            n_positions=1024,
            initializer_range=0.15,
        )
    elif name == "neox":
        config = GPTNeoXConfig(**many)
    elif name == "phi":
        config = PhiConfig(**many)
    else:
        raise ValueError(name)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


#: A chat template: a role is one letter, <U, <A, <S, and a message ends in >.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] | upper }}{{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<A{% endif %}"
)


def spelling_tokenizer(template: str | None = None) -> Any:
    """A tokenizer of one token a character, which is its code; > ends an answer."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(n): n for n in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    inner.pre_tokenizer = split
    inner.decoder = tokenizers.decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    made.chat_template = template
    return made


def saved(path: Any, model: Any, template: str | None = None) -> str:
    """A folder with a model and a tokenizer of one token a character."""
    spelling_tokenizer(template).save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def padded_batch(batch: int, width: int = 40) -> tuple[Tensor, Tensor]:
    """Random left-padded prompts: ids and mask [batch, width]; row n has 7 n + (n > 1) pads."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCAB, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 7 * row + (row > 1)] = 0
    return ids * mask, mask


def generate(
    model: Any, ids: Tensor, mask: Tensor, new: int = 64, **kw: Any
) -> tuple[Tensor, Tensor]:
    """Greedy generate(): new tokens [B, n] and logits [B, n, V]."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kw,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


@torch.no_grad()
def greedy(
    step: Callable[..., Any],
    cache: Any,
    ids: Tensor,
    mask: Tensor,
    new: int = 64,
    prefill: Callable[..., Any] | None = None,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop a user would write around a static cache: tokens [B, n], logits [B, n, V].

    ``step`` runs one token at a time, ``prefill`` (default: ``step``) the prompt. ``forced``
    [B, n] is fed instead of the model's own choice.
    """
    batch, width = ids.shape
    length = getattr(cache, "max_cache_len", None) or cache.layers[-1].max_cache_len
    full = torch.ones(batch, length, dtype=mask.dtype)
    full[:, :width] = mask
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    out = (prefill or step)(ids, attention_mask=full, position_ids=position, past_key_values=cache)
    logits, tokens = [out.logits[:, -1]], [out.logits[:, -1].argmax(-1)]
    position = position[:, -1:]
    for n in range(new - 1):
        position = position + 1
        token = tokens[-1] if forced is None else forced[:, n].contiguous()
        out = step(
            token[:, None], attention_mask=full, position_ids=position, past_key_values=cache
        )
        logits.append(out.logits[:, -1])
        tokens.append(logits[-1].argmax(-1))
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def max_error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def same_state(state: LayerState) -> Callable[[], bool]:
    """Remember every byte of a state; the result says if all are there."""
    before = [x.clone() for x in state.tensors]

    def unchanged() -> bool:
        return all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(before, state.tensors, strict=True)
        )

    return unchanged


def store(state: LayerState, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor) -> None:
    """What a forward of these keys and values [B, H, T, D] does to a state, without queries."""
    state.keeper.tick(k.shape[2])
    batch, heads, tokens, dim = k.shape
    q = k.new_zeros(batch, heads * state.group, tokens, dim)
    state.retain(q, k, v, mask, position, dim**-0.5)
    state.append(k, v, mask, position)


def layer_state(
    codec: str = "identity",
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    tokens: int = 128,
    dtype: torch.dtype = torch.float32,
    poison: bool = True,
    **kw: Any,
) -> LayerState:
    """A fresh state; what no token has been written to is filled with garbage."""
    config = Config(codec=codec, **{"bits": 64.0, **SMALL, **kw})
    state = LayerState(config, batch, heads, head_dim, tokens, dtype, torch.device("cpu"))
    if poison:
        state.tensors.exact_keys.fill_(torch.nan)
        state.tensors.exact_values.fill_(torch.nan)
        state.tensors.pool.fill_(0xFF)
    return state


# ---------------------------------------------------------------- plain modules


class PlainAttention(nn.Module):
    """gpt-fast's attention: registered cache buffers, indexed assignment, SDPA on the buffers."""

    def __init__(
        self, gqa: str, dim: int, heads: int, kv_heads: int, batch: int, slots: int
    ) -> None:
        super().__init__()
        self.gqa, self.heads, self.kv_heads, self.head_dim = gqa, heads, kv_heads, dim // heads
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        shape = (batch, kv_heads, slots, self.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            part.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for part in self.wqkv(x).split(sizes, dim=-1)
        )
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        if self.gqa == "enable_gqa":
            y = F.scaled_dot_product_attention(
                q, self.k_cache, self.v_cache, attn_mask=mask, enable_gqa=True
            )
        else:
            repeat = self.heads // self.kv_heads
            keys = self.k_cache.repeat_interleave(repeat, dim=1)
            values = self.v_cache.repeat_interleave(repeat, dim=1)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(batch, tokens, -1))


class PlainModel(nn.Module):
    """A small decoder in the style of gpt-fast. ``forward(ids, input_pos)`` -> logits."""

    def __init__(
        self, gqa: str = "enable_gqa", layers: int = 2, batch: int = 1, slots: int = 128
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        dim, heads, kv_heads = 64, 4, 2
        self.embed = nn.Embedding(VOCAB, dim)
        self.place = nn.Embedding(slots, dim)
        self.layers = nn.ModuleList(
            PlainAttention(gqa, dim, heads, kv_heads, batch, slots) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.register_buffer("causal", torch.tril(torch.ones(slots, slots, dtype=torch.bool)))
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.15)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(input_pos)
        mask = self.causal[None, None, input_pos]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x), mask, input_pos)
        return self.head(x)

    def cache_bytes(self) -> int:
        """Memory behind the cache buffers."""
        return sum(
            buffer.untyped_storage().nbytes()
            for name, buffer in self.named_buffers()
            if name.endswith("_cache")
        )


@torch.no_grad()
def plain_greedy(
    step: Callable[..., Tensor],
    ids: Tensor,
    new: int,
    prefill: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding of a :class:`PlainModel`: tokens [B, n], logits [B, n, V]."""
    width = ids.shape[1]
    logits = [(prefill or step)(ids, torch.arange(width))[:, -1]]
    for n in range(new - 1):
        token = logits[-1].argmax(-1)[:, None]
        logits.append(step(token, torch.tensor([width + n]))[:, -1])
    stacked = torch.stack(logits, 1)
    return stacked.argmax(-1), stacked


def cached_attention(q, k, v, keys, values, input_pos, mask):
    keys[:, :, input_pos] = k
    values[:, :, input_pos] = v
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def prompt(x, keys, values):
    """The first tokens of a sequence: queries, keys and values of one length."""
    position = torch.arange(x.shape[2])
    mask = (torch.arange(512) <= position[:, None])[None, None]
    return cached_attention(x, x + 1, x + 2, keys, values, position, mask)


def symbolic(tokens: int) -> Tensor:
    """What ``prompt`` takes, of a length that Dynamo makes a symbol."""
    x = torch.randn(1, 2, tokens, 16)
    torch._dynamo.mark_dynamic(x, 2)
    return x


def attention_inputs(tokens: int = 1, start: int = 0):
    q, k, v = torch.randn(3, 1, 2, tokens, 16).unbind()
    keys, values = (torch.zeros(1, 2, 512, 16) for _ in range(2))
    position = torch.arange(start, start + tokens)
    mask = (torch.arange(512) <= position[:, None])[None, None]
    return q, k, v, keys, values, position, mask
