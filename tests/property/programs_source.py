"""A :class:`Program` as the PyTorch code that a person might have written."""

from __future__ import annotations

import itertools
import linecache
from dataclasses import replace
from typing import Any

import torch
from programs import FLOAT_MASKS, Program
from torch import nn

_HEAD = """import math

import torch
import torch.nn.functional as F


def rope(x, position):
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
"""

_WRITES = {
    "index_copy": "self.{cache}.index_copy_(2, {pos}, {new})",
    "index_copy_out": "{cache} = self.{cache}.index_copy_(2, {pos}, {new})",
    "assign": "self.{cache}[:, :, {pos}] = {new}",
    "assign_full": "self.{cache}[:, :, {pos}, :] = {new}",
    "assign_ellipsis": "self.{cache}[..., {pos}, :] = {new}",
    "assign_slice": "self.{cache}[:, :, start : start + tokens] = {new}",
    "copy_slice": "self.{cache}[..., start : start + tokens, :].copy_({new})",
    "copy_narrow": "self.{cache}.narrow(2, start, tokens).copy_({new})",
}
_GROUPED = {
    "repeat_interleave": "{x}.repeat_interleave({n}, dim=1)",
    "interleave_function": "torch.repeat_interleave({x}, {n}, 1)",
    "expand_reshape": (
        "{x}[:, :, None].expand(-1, -1, {n}, -1, -1).reshape(batch, {heads}, -1, {dim})"
    ),
    "unsqueeze_flatten": "{x}.unsqueeze(2).expand(-1, -1, {n}, -1, -1).flatten(1, 2)",
}
_SCORES = {
    "matmul": "q @ keys.transpose(-2, -1)",
    "torch_matmul": "torch.matmul(q, keys.transpose(2, 3))",
    "mT": "q @ keys.mT",
    "method": "q.matmul(keys.permute(0, 1, 3, 2))",
    "einsum": 'torch.einsum("bhtd,bhsd->bhts", q, keys)',
    "einsum_bthd": 'torch.einsum("bqhd, bhkd -> bhqk", q.transpose(1, 2), keys)',
}
_OUTPUTS = {
    "torch_matmul": "torch.matmul(w, values)",
    "method": "w.matmul(values)",
    "einsum": 'torch.einsum("bhts,bhsd->bhtd", w, values)',
    "einsum_bthd": 'torch.einsum("bhqk,bhkd->bqhd", w, values).transpose(1, 2)',
}
_SOFTMAXES = {
    "method": "w.softmax(dim=-1)",
    "function": "F.softmax(w, -1)",
    "fp32": "F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)",
    "float_type_as": "torch.softmax(w.float(), dim=-1).type_as(q)",
    "with_dropout_off": "F.dropout(F.softmax(w, dim=3), p=0.1, training=self.training)",
}
_FILLS = {"inf": 'float("-inf")', "min": "torch.finfo({dtype}).min", "1e9": "-1e9"}
_APPLY = {
    "masked_fill": "w = w.masked_fill(~mask, {fill})",
    "masked_fill_eq": "w = w.masked_fill(mask == 0, {fill})",
    "where": "w = torch.where(mask, w, {fill})",
    "in_place": "w.masked_fill_(~mask, {fill})",
}


def _scale(p: Program) -> str:
    root = f"math.sqrt({p.head_dim})"
    return {"default": "", "divide": f"1 / {root}", "number": "0.3"}.get(p.scale, "1.0")


def _attention(p: Program) -> list[str]:
    if p.attention == "sdpa":
        options = ["attn_mask=mask"]
        if p.mask == "flag":
            options = ["is_causal=tokens > 1"]
        if p.scale != "default":
            options.append(f"scale={_scale(p)}")
        if p.distractor == "dropout":
            options.append("dropout_p=0.1")
        if p.gqa == "enable_gqa" and p.group > 1:
            options.append("enable_gqa=True")
        return [f"y = F.scaled_dot_product_attention(q, keys, values, {', '.join(options)})"]
    lines = [f"w = {_SCORES[p.attention]}"]
    scaled = {
        "default": f"w = w * {p.head_dim}**-0.5",
        "divide": f"w = w / math.sqrt({p.head_dim})",
        "number": "w = 0.3 * w",
    }.get(p.scale)
    masked = _masked(p)
    if p.distractor == "mask_scaled":
        lines += [*masked, "w = w * 0.5"]
    else:
        lines += [*([scaled] if scaled else []), *masked]
    if p.distractor == "query_changed":
        lines.append("q.zero_()")
    if p.distractor == "softcap":
        lines.insert(1, "w = 20.0 * torch.tanh(w / 20.0)")
    lines.append(f"w = {_SOFTMAXES[p.softmax]}")
    if p.distractor == "dropout":
        lines.append("w = F.dropout(w, 0.1)")
    if p.distractor == "weights_scaled":
        lines.append("w = w * self.gate")
    lines.append(f"y = {_OUTPUTS.get(p.attention, 'w @ values')}")
    return lines


def _masked(p: Program) -> list[str]:
    if p.mask == "flag":
        mask = "torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)"
        return ["if tokens > 1:", f"    w = w.masked_fill({mask}, {_fill(p)})"]
    if p.mask in FLOAT_MASKS or p.distractor == "bool_added":
        return ["w += mask" if p.apply == "in_place" else "w = w + mask"]
    fill = "-5.0" if p.distractor == "weak_fill" else _fill(p)
    return [_APPLY[p.apply].format(fill=fill)]


def _fill(p: Program) -> str:
    return _FILLS[p.fill].format(dtype="w.dtype")


def _layer(p: Program, name: str) -> list[str]:
    b, h, s, d = p.batch, p.kv_heads, p.slots, p.head_dim
    made = f"torch.zeros({b}, {h}, {s}, {d}, dtype=torch.{p.dtype})"
    if p.layout == "cache_by_slot":
        made = f"torch.zeros({b}, {s}, {h}, {d}, dtype=torch.{p.dtype}).transpose(1, 2)"
    keys, values, first = made, made, []
    if p.distractor in ("aliased", "overlapping"):
        first = [f"both = torch.zeros(2, {b}, {h}, {s}, {d}, dtype=torch.{p.dtype})"]
        keys, values = "both[0]", "both[1]" if p.distractor == "aliased" else "both[0]"
    init = [
        f"self.qkv = torch.nn.Linear(16, {(p.heads + 2 * h) * d}, bias=False)",
        f"self.out = torch.nn.Linear({p.heads * d}, 16, bias=False)",
        *first,
        f'self.register_buffer("keys", {keys})',
        f'self.register_buffer("values", {values})',
    ]
    if p.distractor == "alias_read":
        init.append('self.register_buffer("alias", self.keys.detach())')
    if p.distractor == "weights_scaled":
        init.append(f'self.register_buffer("gate", torch.rand({p.heads}, 1, 1))')
    return [
        "",
        "",
        f"class {name}(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *("        " + line for line in init),
        "",
        "    def forward(self, x, pos, start, mask):",
        *("        " + line for line in _forward(p)),
    ]


def _forward(p: Program) -> list[str]:
    h, d = p.kv_heads, p.head_dim
    copied = ".contiguous()" if p.layout == "contiguous" else ""
    lines = [
        "batch, tokens, _ = x.shape",
        f"qkv = self.qkv(x).view(batch, tokens, -1, {d}).transpose(1, 2)",
        f"q, k, v = (y{copied} for y in qkv.split([{p.heads}, {h}, {h}], dim=1))",
    ]
    if p.norm != "none":
        lines.append(f"q, k = (F.{p.norm}_norm(y, ({d},)) for y in (q, k))")
    if p.rope and p.distractor != "rope_after":
        lines.append("q, k = rope(q, pos), rope(k, pos)")
    if p.scale == "query":
        lines.append(f"q = q * {d}**-0.5")
    lines += ["keys, values = self.keys, self.values"]
    other = "pos * 1" if p.distractor == "other_positions" else "pos"
    if p.distractor == "other_positions" and not _indexed(p):
        p = replace(p, write="assign")
    writes = [
        _WRITES[p.write].format(cache="keys", new="k", pos="pos"),
        _WRITES[p.write].format(cache="values", new="v", pos=other),
    ]
    reads = []
    if p.read == "sliced" or p.mask == "flag":
        reads.append("keys, values = keys[:, :, : start + tokens], values[:, :, : start + tokens]")
    if p.distractor == "rope_after":
        reads.append("keys = rope(keys, torch.arange(keys.shape[2], device=x.device))")
    if p.group > 1 and p.distractor == "tiled":
        reads += [f"{x} = {x}.repeat(1, {p.group}, 1, 1)" for x in ("keys", "values")]
    elif p.group > 1 and p.gqa in _GROUPED:
        given = {"n": p.group, "heads": p.heads, "dim": d}
        reads += [f"{x} = {_GROUPED[p.gqa].format(x=x, **given)}" for x in ("keys", "values")]
    body = [*reads, *_attention(p)]
    if p.distractor == "written_late":
        lines += [
            *body,
            *(line.removeprefix("keys = ").removeprefix("values = ") for line in writes),
        ]
    else:
        changed = ["k.zero_()", "v.zero_()"] if p.distractor == "new_changed" else []
        lines += [*writes, *changed, *body]
    if p.distractor == "written_twice":
        lines.insert(lines.index(writes[1]) + 1, "self.values[:, :, pos] = v * 2")
    if p.distractor in ("read_elsewhere", "alias_read"):
        seen = "keys" if p.distractor == "read_elsewhere" else "alias"
        lines.append(f"y = y + self.{seen}.mean()")
    lines.append("y = self.out(y.transpose(1, 2).reshape(batch, tokens, -1))")
    extra = {"returned": "self.values[:, :, :1]", "weights_returned": "w"}.get(p.distractor)
    lines.append(f"return y, {extra}" if extra else "return y")
    return lines


def _indexed(p: Program) -> bool:
    return "{pos}" in _WRITES[p.write]


def _mask(p: Program) -> list[str]:
    """Lines that make the mask over all slots from the positions."""
    if p.mask == "flag":
        return ["mask = None"]
    lines = [f"slot = torch.arange({p.slots}, device=x.device)"]
    see = "self.causal[pos]" if p.mask == "table" else "slot <= pos[:, None]"
    if p.mask == "window":
        see = f"({see}) & (slot > pos[:, None] - {max(1, p.slots // 4)})"
    if p.distractor == "sliding":
        see = f"({see}) & (slot > pos[:, None] - {p.slots})"
    lines.append(f"mask = {see}")
    if p.mask == "padded":
        lines.append("mask = mask & (slot >= self.pads[:, None, None, None])")
    elif p.mask != "two_axes":
        lines.append("mask = mask[None, None]")
    if p.mask in FLOAT_MASKS:
        fill = _FILLS[p.fill].format(dtype="x.dtype")
        lines.append(f"mask = x.new_zeros(()).masked_fill(~mask, {fill})")
    if p.mask == "bias":
        slopes = f"(torch.arange({p.heads}, device=x.device) / 8).view(1, -1, 1, 1)"
        lines.append(f"mask = mask + ({slopes} * (slot - pos[:, None])).to(x.dtype)")
    if p.read == "sliced":
        lines.append("mask = mask[..., : start + x.shape[1]]")
    return lines


def source(p: Program) -> str:
    """The program's code, with a class ``Model``; ``forward(x, pos, start)``."""
    plain = replace(p, distractor="none")
    planted = p.distractor not in ("none", "sliding", "gradients")
    lines = [_HEAD.rstrip()]
    if p.layers > 1 or not planted:
        lines += _layer(plain if planted else p, "Layer")
    if planted:
        lines += _layer(p, "Last")
    kinds = ["Layer()"] * (p.layers - planted) + ["Last()"] * planted
    buffers = []
    if p.mask == "table":
        square = f"torch.ones({p.slots}, {p.slots}, dtype=torch.bool)"
        buffers.append(f'self.register_buffer("causal", {square}.tril())')
    if p.mask == "padded":
        buffers.append(f'self.register_buffer("pads", torch.tensor({p.pads}))')
    out = p.distractor in ("returned", "weights_returned")
    lines += [
        "",
        "",
        "class Model(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.layers = torch.nn.ModuleList([{', '.join(kinds)}])",
        *("        " + line for line in buffers),
        "",
        "    def forward(self, x, pos, start):",
        *("        " + line for line in _mask(p)),
    ]
    if out:
        lines += [
            "        for layer in self.layers[:-1]:",
            "            x = x + layer(x, pos, start, mask)",
            "        y, extra = self.layers[-1](x, pos, start, mask)",
            "        return x + y, extra",
        ]
    else:
        lines += [
            "        for layer in self.layers:",
            "            x = x + layer(x, pos, start, mask)",
            "        return x",
        ]
    return "\n".join(lines) + "\n"


_number = itertools.count()


def to_module(p: Program) -> nn.Module:
    """The module that ``source`` describes, with random weights; equal ones for equal specs."""
    text, name = source(p), f"program_{next(_number)}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, name, "exec"), space)
    torch.manual_seed(p.seed)
    model = space["Model"]().to(getattr(torch, p.dtype)).eval()
    model.requires_grad_(p.distractor == "gradients")
    return model


def inputs(p: Program) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """The arguments of every forward."""
    generator = torch.Generator("cpu").manual_seed(p.seed)
    x = torch.randn(p.batch, p.tokens, 16, generator=generator, dtype=torch.float64, device="cpu")
    out, start = [], 0
    for count in (*p.chunks, *(1,) * p.steps):
        end = start + count
        part = x[:, start:end].to(torch.get_default_device(), getattr(torch, p.dtype))
        out.append((part, torch.arange(start, end), start))
        start = end
    return out


def as_file(p: Program) -> str:
    """A file to run by itself: the program, dense and through the pass, and how far they differ."""
    calls = [(count, start) for (_, pos, start) in inputs(p) for count in (len(pos),)]
    return f'''"""{p}"""

{source(p)}

import skv_compile

torch.manual_seed({p.seed})
dense = Model().to(torch.{p.dtype}).eval().requires_grad_({p.distractor == "gradients"})
torch.manual_seed({p.seed})
model = Model().to(torch.{p.dtype}).eval().requires_grad_({p.distractor == "gradients"})
settings = dict(codec="identity", sinks=2, recent=5, page_tokens=8, inner="eager")
step = torch.compile(model, backend="skv", options=settings)
with torch.set_grad_enabled({p.distractor == "gradients"}):
    for count, start in {calls}:
        x = torch.randn({p.batch}, count, 16).to(torch.{p.dtype})
        arguments = x, torch.arange(start, start + count), start
        want, got = dense(*arguments), step(*arguments)
        for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (want, got))):
            print(count, start, (a.double() - b.double()).abs().max().item())
'''
