"""Bugs put into a copy of the package one at a time, and which tests notice: the table of
``make mutants``.

    python benchmarks/mutants.py [--only WORD] [--jobs N] [--json FILE]

A mutant that no test kills is a hole in the tests, and the exit status says so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
LIMIT = 600  # seconds of one mutant's tests

REFERENCE = "tests/property/test_reference.py"
POOL = "tests/property/test_retention_pool.py"
PROTOCOL = "tests/integration/test_cache_protocol.py"
MODELS = "tests/integration/test_identity_models.py -k llama"
KERNELS = "tests/property/test_kernels.py"
FRAME = "tests/unit/test_frame.py"
PROGRAMS = "tests/property/test_programs.py"
BLOCKED = "tests/property/test_programs_blocked.py"
NATIVE = "tests/property/test_cpu_kernels.py"


class Mutant(NamedTuple):
    """A bug: in ``file``, ``old``, which is there once, becomes ``new``. ``tests``: those that
    should notice, arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def _attend(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "lowering/reference/attend.py", old, new, REFERENCE)


def _append(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "lowering/reference/append.py", old, new, REFERENCE)


def _native(name: str, file: str, old: str, new: str) -> Mutant:
    tests = f"{NATIVE} -k 'equal or codes or length'"
    return Mutant(name, f"lowering/cpu/src/{file}", old, new, tests)


MUTANTS = (
    _attend("logits without their scale", "group * tokens, head_dim) * scale", "group * tokens, head_dim)"),
    _attend("a mask read one slot off", "slot = (token + pad[:, None, None])", "slot = (token + 1 + pad[:, None, None])"),
    _attend("query heads in another order", "out.reshape(batch, q_heads, tokens, head_dim)", "out.roll(1, 1).reshape(batch, q_heads, tokens, head_dim)"),
    _attend("values without their radius", 'codes.decode_radius(records["value_radius"]).squeeze(-1).to(math)', "1.0 + 0 * vd[..., 0]"),
    _attend("the radius of the neighbour", 'codes.decode_radius(records["key_radius"]).to(rows.dtype)', 'codes.decode_radius(records["key_radius"]).to(rows.dtype).roll(1, 2)'),
    _attend("no past beyond the sinks", "live = torch.cat([t < past[:, None], live], 1)", "live = torch.cat([t < past[:, None], live & False], 1)"),
    Mutant("a causal chunk that sees itself whole", "lowering/reference/attend.py", "q, k, v, is_causal=causal, scale=scale)\n", "q, k, v, scale=scale)\n", f"{PROGRAMS} -k every_attention"),
    _append("the newest token missing in the ring", "i = i_new[:, None] - 1 - (i_new[:, None] - 1 - slots) % layout.ring", "i = i_new[:, None] - 2 - (i_new[:, None] - 2 - slots) % layout.ring"),
    _append("sinks that are overwritten", "new = (t >= found.length[:, None]) &", "new = (t >= 0) &"),
    _append("a length that is not counted", "torch.stack([found.pad, found.new_length, found.new_coded], 1)", "torch.stack([found.pad, found.length, found.new_coded], 1)"),
    Mutant("padding that is stored", "lowering/reference/intake.py", "lead = torch.where(length == 0, leading(valid), 0)", "lead = torch.where(length == 0, 0 * leading(valid), 0)", REFERENCE),
    Mutant("NaN that is stored", "lowering/reference/intake.py", "bad_value = (stored & ~(finite_tokens(k) & finite_tokens(v))).any()", "bad_value = (stored & ~(finite_tokens(k) | finite_tokens(v))).any()", "tests/property/test_reference_errors.py"),
    Mutant("a cache that is too full", "lowering/reference/intake.py", "bad_room = start + tokens > layout.max_tokens", "bad_room = start + tokens > layout.max_tokens + 1", "tests/property/test_reference_errors.py tests/integration/test_errors.py"),
    Mutant("a turn the other way", "lowering/reference/pages.py", "way * block_start(i, layout)", "abs(way) * block_start(i, layout)", f"{REFERENCE} {FRAME}"),
    Mutant("gaps that begin one late", "lowering/reference/pages.py", "return base + gap.long().cumsum(-1), live", "return base + 1 + gap.long().cumsum(-1), live", POOL),
    Mutant("digits packed backwards", "lowering/codes.py", "return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6", "return quads[..., 3] | quads[..., 2] << 2 | quads[..., 1] << 4 | quads[..., 0] << 6", "tests/unit/test_layout.py"),
    Mutant("a frame that forgets its centre", "lowering/codes.py", "return torch.cat([self.spread(back[:, :-1].mT).mT, back[:, -1:]], 1)", "return torch.cat([self.spread(back[:, :-1].mT).mT, 0 * back[:, -1:]], 1)", f"{FRAME} {REFERENCE}"),
    Mutant("the scale of a site lost", "skv_compile/rewrite.py", "scale = layout.head_dim**-0.5 if site.scale is None else site.scale", "scale = layout.head_dim**-0.5", f"{PROGRAMS} -k every_scale"),
    Mutant("is_causal lost in the rewrite", "skv_compile/rewrite.py", "                site.is_causal,\n", "                False,\n", f"{PROGRAMS} -k every_attention"),
    Mutant("a counter that does not count", "skv_compile/cache/layer.py", "        self.cumulative_length.add_(tokens)\n        begins", "        begins", PROTOCOL),
    Mutant("a traced counter that does not count", "skv_compile/cache/layer.py", "        self.cumulative_length.add_(tokens)\n        self.keys.index_copy_", "        self.keys.index_copy_", MODELS),
    Mutant("a salt without the source", "skv_compile/salt.py", 'return ("skv", source_hash(), self._config)\n', 'return ("skv", self._config)\n', "tests/integration/test_compile_neighbours.py -k salt"),
    Mutant("a salt without the config", "skv_compile/salt.py", 'return ("skv", source_hash(), self._config)\n', 'return ("skv", source_hash())\n', "tests/integration/test_compile_neighbours.py -k salt"),
    Mutant("pages that two groups own", "skv_compile/cache/pool.py", "        self.free -= count\n", "        self.free -= count - 1 if count > 1 else count\n", POOL),
    Mutant("pages that are never given back", "skv_compile/cache/pool.py", "        self.free += len(pages)\n", "", POOL),
    Mutant("a table that lists what is gone", "skv_compile/cache/pool.py", "        self.table[index] = -1\n", "", POOL),
    Mutant("a forward that is not undone", "skv_compile/cache/journal.py", "            state.restore(undo)\n", "", "tests/integration/test_errors.py tests/integration/test_cache_in_use.py tests/integration/test_bundle.py"),
    Mutant("crop that leaves pages", "skv_compile/cache/state.py", "                    self._reopen(row, coded, i - coded)\n", "                    pass\n", PROTOCOL),
    Mutant("rows that stay where they were", "skv_compile/cache/state.py", "old.copy_(new.index_select(0, rows))", "old.copy_(new)", PROTOCOL),
    Mutant("a budget that is overdrawn", "skv_compile/retention/decide.py", "        if excess <= 0:\n", "        if excess <= 1:\n", f"{POOL} tests/unit/test_allocate.py"),
    Mutant("the cheapest level, not the best", "skv_compile/retention/allocate.py", "slope[..., n - 1 :, :n].amin(-1).amax(-1)", "slope[..., n - 1 :, :n].amax(-1).amax(-1)", "tests/unit/test_allocate.py"),
    Mutant("coarser codes of other tokens", "skv_compile/retention/recode.py", "found.append({name: x.flatten(0, 2)[fold.at] for name, x in coded.items()})", "found.append({name: x.flatten(0, 2)[fold.at.flip(0)] for name, x in coded.items()})", f"{POOL} tests/property/test_retention_attention.py"),
    Mutant("frames of another layer", "skv_compile/retention/bundle.py", "return list(zip(*(x.split(self._heads) for x in found), strict=True))", "return list(zip(*(x.split(self._heads) for x in found), strict=True))[::-1]", "tests/integration/test_bundle.py"),
    Mutant("frames fitted in the middle of a text", "lowering/reference/calibrate.py", "good = (position[0] == 0) & finite.all()", "good = finite.all()", FRAME),
    Mutant("a kernel that turns queries the other way", "lowering/templates/prepare.py.jinja", "tl.where(partner > 0, scale", "tl.where(partner < 0, scale", f"{KERNELS} -k 'equal and (frame or tiers)'"),
    Mutant("a kernel whose tokens are one late", "lowering/templates/pages.py.jinja", "i = base + tl.cumsum(", "i = base + 1 + tl.cumsum(", f"{KERNELS} -k 'equal and tiers'"),
    Mutant("a kernel that adds values by their square", "lowering/templates/pages.py.jinja", "value_log = (value_code.to(tl.float32) - {{ radius_zero }}) * {{ 1 / radius_steps }}", "value_log = (value_code.to(tl.float32) - {{ radius_zero }}) * {{ 2 / radius_steps }}", f"{KERNELS} -k 'equal and frame'"),
    _native("fillers of pages taken for tokens, natively", "codes.h", "live = gap[slot] != GAP_FILLER && i < past.coded;", "live = i < past.coded;"),
    _native("radius of the neighbour, natively", "codes.h", "of_values[n] = RADII.of[vr[n]];", "of_values[n] = RADII.of[vr[n ^ 1]];"),
    _native("a mask one slot late, natively", "codes.h", "show(batch + n, token[n] + past.pad);", "show(batch + n, token[n] + 1 + past.pad);"),
    _native("tokens of pages read in the window too, natively", "exact.h", "i = std::max(past.coded, last - a.ring)", "i = std::max<int64_t>(0, last - a.ring)"),
    _native("codes of the best gain but one, natively", "quantise.cpp", "fit > best) best", "fit < best) best"),
    _native("a token written one slot late, natively", "store.cpp", "a.sinks + i % a.ring", "a.sinks + (i + 1) % a.ring"),
    Mutant("a mask of what is hidden, taken for what is seen", "skv_compile/rewrite.py", 'if mask.form == "hide":', 'if mask.form == "hidden":', f"{PROGRAMS} -k every_attention"),
    Mutant("queries whose axes stay in another order", "skv_compile/rewrite.py", "(query, site.query_order)", "(query, (0, 1, 2, 3))", f"{PROGRAMS} -k every_attention"),
    Mutant("hidden scores that keep a weight", "patterns/attention_manual.py", "value * self.scale <= limit", "value * self.scale <= 0", f"{BLOCKED} -k keeps_an_attention"),
    Mutant("a cache that shares its memory", "skv_compile/leave.py", "used[_memory(x)] > 1", "used[_memory(x)] > 9", f"{BLOCKED} -k keeps_an_attention"),
    Mutant("a cache that somebody else reads", "patterns/written.py", "if user in allowed or", "if True or", f"{BLOCKED} -k keeps_an_attention"),
)  # fmt: skip


def check(mutants: tuple[Mutant, ...]) -> None:
    """Refuse what cannot be applied: a bug that is not there kills nothing."""
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            raise SystemExit(f"{mutant.name}: {mutant.file} has its text {count} times, not once")


def run(mutant: Mutant) -> dict[str, object]:
    """Apply a mutant to a copy and run its tests there."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="skv-mutant-") as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "results", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        target = copy / mutant.file
        target.write_text(target.read_text().replace(mutant.old, mutant.new))
        env = {**os.environ, "PYTHONPATH": str(copy), "SKV_CACHE_DIR": str(Path(folder) / "cache")}
        test = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        test += ["-m", "not slow", "-o", "addopts=", *shlex.split(mutant.tests)]
        try:
            done = subprocess.run(
                test, cwd=copy, env=env, text=True, capture_output=True, timeout=LIMIT
            )
            lines = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
            killed = done.returncode == 1 and bool(lines)
            by = lines[0].split(" - ")[0].removeprefix("FAILED ") if lines else done.stdout[-300:]
        except subprocess.TimeoutExpired:
            killed, by = True, f"no end within {LIMIT} s"
    seconds = round(time.monotonic() - begin, 1)
    return {"name": mutant.name, "file": mutant.file, "killed": killed, "by": by, "s": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mutants with it in their name")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at once")
    parser.add_argument("--json", default=str(RESULTS), metavar="FILE")
    args = parser.parse_args()
    from skv_compile.commands import common

    chosen = tuple(m for m in MUTANTS if args.only in m.name)
    check(chosen)
    found = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(run, chosen):
            found.append(result)
            said = "killed" if result["killed"] else "SURVIVED"
            print(f"{said:9} {result['name']}: {result['by']} ({result['s']} s)", flush=True)
    survived = [x["name"] for x in found if not x["killed"]]
    record = {"mutants": found, "killed": len(found) - len(survived), "survived": survived}
    common.write_json(args.json, shlex.join(["python", *sys.argv]), record)
    print(f"{record['killed']} of {len(found)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())
