"""What a user may choose. One frozen dataclass, validated when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, shown
from .retention.policies import POLICIES

CODECS = ("frame", "grid", "rings", "identity")
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)

MOST_TOKENS = 2**31 - 1  # pages number tokens in int32
MOST_BYTES = 2**63 - 1

#: Points of the measured front of KL against bits (``benchmarks/results/retention.json``).
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"codec": "identity"},
    "quality": {"bits": 3.125},
    "balanced": {"bits": 2.125},
    "small": {"bits": 1.125},
}
#: What a preset promises: KL(exact || compressed) in nats that the demo model's next tokens stay
#: below in the mean, after 3,072 tokens of a document.
PROMISES = {"exact": 1e-6, "quality": 0.0015, "balanced": 0.0025, "small": 0.007}


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"doc": text})


@dataclass(frozen=True)
class Config:
    """How the KV cache is stored.

    Raises:
        ConfigError: a value is out of range, or a name is unknown.
    """

    bits: float = _doc(
        4.125,
        "Bits per coordinate of the compressed region, every stored bit counted, dropped tokens "
        "among the coordinates. With retention='none' the largest tier that fits is taken. Sinks, "
        "recent window and frames come on top.",
    )
    codec: str = _doc(
        "frame",
        "How pages are coded. 'frame': every kv head in a frame fitted to the prompt; 'grid': a "
        "fixed rotation and grid, no calibration; 'rings': the same rotation, pairs of coordinates "
        "as ring and angle; 'identity': exact.",
    )
    retention: str = _doc(
        "",
        f"Which tokens are kept, and in which tier: {', '.join(POLICIES)}. Default: rdr, and none "
        "with codec='identity'.",
    )
    sinks: int = _doc(4, "First tokens of a sequence that stay exact.")
    recent: int = _doc(64, "Last tokens that stay exact.")
    page_tokens: int | None = _doc(
        None,
        "Tokens in a page of the middle tier. Default: 64; with a retention policy 16 up to 8,192 "
        "tokens of cache, 32 up to 32,768, else 64.",
    )
    budget: int | str | None = _doc(
        None,
        "Most bytes the whole cache may take, sinks, window and frames included ('2GiB', '500MB' "
        "or a number). A retention policy fills it, whatever `bits` says; with retention='none' "
        "the finest tier within it is taken, and never more than `bits`.",
    )
    frame: str | None = _doc(
        None,
        "A file written by `skv calibrate`: its frames are used from the first token on, instead "
        "of frames fitted to each prompt. Only with codec='frame'.",
    )
    strict: bool = _doc(
        False,
        "Raise when an attention that has a cache could not be rewritten, instead of warning.",
    )
    retention_table: str | None = _doc(
        None,
        "A file written by `skv calibrate --retrieval-heads`: how far back every head looks. "
        "Needed with retention='retrieval', and only there.",
    )

    if not TYPE_CHECKING:  # checkers read the fields; Python would raise a bare TypeError

        def __new__(cls, /, *_: Any, **settings: Any) -> Config:
            check_names(settings)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        _choice("codec", self.codec, CODECS)
        if isinstance(self.retention, str) and self.retention == "":
            object.__setattr__(self, "retention", _default_retention(self.codec))
        _choice("retention", self.retention, tuple(POLICIES))
        for name, low in (("sinks", 0), ("recent", 1), ("page_tokens", 8)):
            value = getattr(self, name)
            if name == "page_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name}={shown(value)}: expected an integer of at least {low}.")
            if value > MOST_TOKENS:
                raise ConfigError(f"{name}={shown(value)}: expected at most {MOST_TOKENS}.")
        if self.page_tokens is not None and self.page_tokens % 8:
            raise ConfigError(f"page_tokens={self.page_tokens}: expected a multiple of 8.")
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)):
            raise ConfigError(f"bits={shown(self.bits)}: expected a number of bits per coordinate.")
        if not 0 < self.bits <= 64:
            raise ConfigError(f"bits={shown(self.bits)}: expected more than 0 and at most 64.")
        if not isinstance(self.strict, bool):
            raise ConfigError(f"strict={shown(self.strict)}: expected True or False.")
        if self.budget is not None:
            parse_bytes(self.budget)
        if self.frame is not None:
            self._check_frame()
        self._check_table()

    def _check_table(self) -> None:
        name, wanted = self.retention_table, self.retention == "retrieval"
        if name is None:
            if wanted:
                raise ConfigError(
                    "retention='retrieval' needs retention_table=FILE: which heads to keep is "
                    "measured once for a model. Make the file with: skv calibrate MODEL "
                    "--retrieval-heads FILE"
                )
            return
        file = _file_name(name)
        if not file:
            raise ConfigError(
                f"retention_table={shown(name)}: expected the name of a file written by skv "
                "calibrate --retrieval-heads."
            )
        if not wanted:
            raise ConfigError(
                f"retention_table={shown(name)} with retention={self.retention!r}: the table is "
                "for retention='retrieval'. Leave one of the two out."
            )
        object.__setattr__(self, "retention_table", file)

    def _check_frame(self) -> None:
        file = _file_name(self.frame)
        if not file:
            raise ConfigError(
                f"frame={shown(self.frame)}: expected the name of a file written by skv calibrate."
            )
        if self.codec != "frame":
            raise ConfigError(
                f"frame={shown(self.frame)} with codec={self.codec!r}: saved frames are for "
                "codec='frame'. Leave one of the two out."
            )
        object.__setattr__(self, "frame", file)

    @property
    def budget_bytes(self) -> int | None:
        """The budget as a number of bytes."""
        return None if self.budget is None else parse_bytes(self.budget)

    @staticmethod
    def preset(name: str) -> Config:
        """A named setting; what each costs and saves is in the README, what it promises in
        ``config.PROMISES``.

        ``exact``: identity, to tell a wiring bug from a coding error. ``quality``, ``balanced``,
        ``small``: fitted frames and rate-distortion retention at 3.125, 2.125 and 1.125 bits.

        Raises:
            ConfigError: an unknown name.
        """
        _choice("preset", name, tuple(PRESETS))
        return Config(**PRESETS[name])

    def replace(self, /, **changes: Any) -> Config:
        """A copy with some fields changed; unknown names raise with the nearest one suggested."""
        check_names(changes)
        if "codec" in changes and self.retention == _default_retention(self.codec):
            changes.setdefault("retention", "")  # the default of the new codec
        return dataclasses.replace(self, **changes)


def _default_retention(codec: str) -> str:
    return "none" if codec == "identity" else "rdr"


def check_names(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that ``Config`` does not have."""
    known = [f.name for f in dataclasses.fields(Config)]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {shown(name)}.{nearest(name, known)}")
    return options


def make_config(config: Config | None = None, **overrides: Any) -> Config:
    """The configuration that ``config`` with ``overrides`` means."""
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"config={shown(config)}: expected a skv.Config. To change single settings, name them: "
            "skv.compile(model, bits=2.125)."
        )
    return (config or Config()).replace(**overrides)


def nearest(name: object, known: list[str] | tuple[str, ...]) -> str:
    """' Did you mean ...? Known: ...' for an error about a name."""
    text = name if isinstance(name, str) else ""
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


_UNITS = (
    {"": 1, "B": 1}
    | {
        f"{prefix}{suffix}": base**power
        for power, prefix in enumerate("KMGT", start=1)
        for suffix, base in (("B", 1000), ("iB", 1024))
    }
    | {"kB": 1000}
)


def parse_bytes(value: float | str) -> int:
    """'2GiB', '500 MB' or a number -> bytes."""
    count = _bytes(value)
    if not 1 <= count <= MOST_BYTES:
        raise ConfigError(
            f"budget={shown(value)}: expected a positive number of bytes, or a size such as "
            f"'2GiB'{f', at most {MOST_BYTES} bytes' if count > 0 else ''}."
        )
    return count


def _bytes(value: object) -> int:
    """0 for what is no size."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else 0
    if not isinstance(value, str) or len(value) > 80:
        return 0
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)", value.strip())
    if found is None or found[2] not in _UNITS:
        return 0
    return int(Fraction(found[1]) * _UNITS[found[2]])


def _file_name(value: Any) -> str:
    """The name of a file, '' for what cannot be one."""
    try:
        name = os.fspath(value)
        os.fsencode(name)
    except (TypeError, ValueError):
        return ""
    return name if isinstance(name, str) and "\0" not in name else ""


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name}={shown(value)} is not known.{nearest(value, known)}")
