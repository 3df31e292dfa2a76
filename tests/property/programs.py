"""Random attention programs: what one is, which there are, and what the pass must do with them.

A :class:`Program` says how a small decoder is written. ``programs_source`` prints it as plain
PyTorch, ``programs_run`` runs it dense and rewritten. ``expected`` follows from the spelling
alone and never asks the pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hypothesis import strategies as st

#: How many programs a test tries: more with SKV_EXAMPLES=2000.
EXAMPLES = int(os.environ.get("SKV_EXAMPLES", "0"))

INDEX_WRITES = ("index_copy", "index_copy_out", "assign", "assign_full", "assign_ellipsis")
SLICE_WRITES = ("assign_slice", "copy_slice", "copy_narrow")
WRITES = INDEX_WRITES + SLICE_WRITES
GROUPINGS = ("repeat_interleave", "interleave_function", "expand_reshape", "unsqueeze_flatten")
MANUAL = ("matmul", "torch_matmul", "mT", "method", "einsum", "einsum_bthd")
ATTENTIONS = ("sdpa", *MANUAL)
SOFTMAXES = ("method", "function", "fp32", "float_type_as", "with_dropout_off")
BOOL_MASKS = ("bool", "two_axes", "table", "window", "padded")
FLOAT_MASKS = ("additive", "bias")
MASKS = (*BOOL_MASKS, *FLOAT_MASKS, "flag")
SCALES = ("default", "divide", "number", "query", "one")
DTYPES = ("float32", "bfloat16", "float16", "float64")

#: What must keep an attention dense, and the code of the reason. Those in ``MANUAL_ONLY`` can
#: only be written by hand.
DISTRACTORS = {
    "read_elsewhere": "cache-escapes",
    "returned": "cache-escapes",
    "aliased": "aliased",
    "overlapping": "aliased",
    "alias_read": "aliased",
    "written_twice": "written-twice",
    "written_late": "written-after-read",
    "other_positions": "positions-differ",
    "new_changed": "changed",
    "rope_after": "read-view",
    "tiled": "gqa",
    "dropout": "dropout",
    "sliding": "sliding",
    "gradients": "gradients",
    "weights_returned": "weights",
    "weights_scaled": "weights",
    "query_changed": "changed",
    "softcap": "scores",
    "weak_fill": "mask-value",
    "mask_scaled": "mask-scaled",
    "bool_added": "mask-dtype",
}
MANUAL_ONLY = (
    "query_changed",
    "weights_returned", "weights_scaled", "softcap", "weak_fill", "mask_scaled", "bool_added",
)  # fmt: skip
#: Distractors of the whole model; others sit in its last layer.
EVERYWHERE = ("sliding", "gradients")


@dataclass(frozen=True)
class Program:
    """How a decoder is written and run. The first choice of every field is the plainest."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 16
    slots: int = 32
    chunks: tuple[int, ...] = (3,)
    """The prompt, a forward each."""
    steps: int = 2
    """Forwards of one token after it."""
    layers: int = 1
    dtype: str = "float32"
    write: str = "index_copy"
    gqa: str = "repeat_interleave"
    read: str = "whole"
    attention: str = "sdpa"
    softmax: str = "method"
    mask: str = "bool"
    fill: str = "inf"
    """What hides a slot: "inf", "min" of the dtype, or "1e9"."""
    apply: str = "masked_fill"
    """How manual attention applies a mask."""
    scale: str = "default"
    rope: bool = False
    norm: str = "none"
    layout: str = "contiguous"
    distractor: str = "none"
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def tokens(self) -> int:
        return sum(self.chunks) + self.steps

    @property
    def pads(self) -> list[int]:
        """Left padding of every row."""
        most = sum(self.chunks) - 1
        return [min(most, 2 * row + 1) if self.mask == "padded" else 0 for row in range(self.batch)]

    def __str__(self) -> str:
        """Only what is not as plain as can be."""
        default = Program()
        names = [name for name, value in vars(self).items() if value != getattr(default, name)]
        return f"Program({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


@dataclass(frozen=True)
class Expected:
    """What the pass owes every graph of a program: sites, and the codes of its refusals."""

    rewrites: int
    codes: tuple[str, ...] = ()


def expected(program: Program) -> Expected:
    """What must happen, from the spelling alone: every layer is a site but for its distractor."""
    layers = program.layers
    if program.distractor == "none":
        return Expected(layers)
    code = DISTRACTORS[program.distractor]
    if program.distractor in EVERYWHERE:
        return Expected(0, (code,) * layers)
    return Expected(layers - 1, (code,))


def is_possible(program: Program) -> bool:
    """Whether the fields go together: PyTorch runs the program, and it means what it should."""
    manual = program.attention != "sdpa"
    boolean = program.mask in BOOL_MASKS
    return all(
        (
            program.tokens <= program.slots,
            program.mask != "flag" or len(program.chunks) == 1,
            program.gqa != "enable_gqa" or not manual,
            # Rows that see nothing must stay finite, as they would in a model.
            program.mask != "padded" or program.fill == "min" or not manual,
            # -1e9 is no float16.
            program.fill != "1e9" or program.dtype != "float16",
            program.distractor not in MANUAL_ONLY or manual,
            program.distractor not in ("weak_fill", "bool_added", "sliding") or boolean,
            program.distractor != "mask_scaled" or program.mask in FLOAT_MASKS,
            program.distractor != "tiled" or program.group > 1,
        )
    )


def one_forward(program: Program) -> Program:
    """Its first forward and one layer alone: one graph, which takes a quarter of a second."""
    return replace(program, chunks=program.chunks[:1], steps=0, layers=1)


_some = st.sampled_from


@st.composite
def programs(draw, distractors: tuple[str, ...] = ("none",), **fixed) -> Program:
    """Any program with one of these distractors; fields by name are not drawn."""
    distractor = draw(_some(distractors))
    attention = draw(_some(MANUAL if distractor in MANUAL_ONLY else ATTENTIONS))
    manual = attention != "sdpa"
    masks: tuple[str, ...] = MASKS
    if distractor in ("weak_fill", "bool_added", "sliding"):
        masks = BOOL_MASKS
    elif distractor == "mask_scaled":
        masks = FLOAT_MASKS
    mask = draw(_some(masks))
    dtype = draw(_some(DTYPES))
    fills = ("inf", "min") if dtype == "float16" else ("inf", "min", "1e9")
    chunks = draw(st.lists(st.integers(1, 16), min_size=1, max_size=1 if mask == "flag" else 3))
    if mask == "flag" and chunks == [1]:
        chunks = [2]
    program = Program(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(2 if distractor == "tiled" else 1, 3)),
        head_dim=draw(_some((16, 32))),
        slots=draw(_some((32, 56, 64))),
        chunks=tuple(chunks),
        steps=draw(st.integers(1, 3)),
        layers=draw(st.integers(1, 2)),
        dtype=dtype,
        write=draw(_some(WRITES)),
        gqa=draw(_some(GROUPINGS if manual else (*GROUPINGS, "enable_gqa"))),
        read=draw(_some(("whole", "sliced"))),
        attention=attention,
        softmax=draw(_some(SOFTMAXES)) if manual else "method",
        mask=mask,
        fill="min" if mask == "padded" else draw(_some(fills)),
        apply=draw(_some(("masked_fill", "masked_fill_eq", "where", "in_place"))),
        scale=draw(_some(SCALES)),
        rope=draw(st.booleans()),
        norm=draw(_some(("none", "rms", "layer"))),
        layout=draw(_some(("contiguous", "transposed", "cache_by_slot"))),
        distractor=distractor,
        seed=draw(st.integers(0, 3)),
    )
    program = replace(program, **fixed)
    while program.tokens > program.slots:  # shrinks towards the front
        program = replace(program, chunks=program.chunks[:-1])
    return program
