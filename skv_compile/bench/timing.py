"""Medians of CUDA graphs, and what memory can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

Launch = Callable[[], Any]


def milliseconds(launches: Sequence[Launch], repeat: int = 30) -> float:
    """Median time of one of several launches that are captured together and replayed.

    Several, on data of their own, so that a replay does not find its data in the L2 cache.
    """
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    torch.cuda.synchronize()
    return median(graph.replay, repeat) / len(launches)


def times(run: Launch, repeat: int) -> list[float]:
    """Milliseconds of ``run`` on the device, one at a time."""
    found = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found


def median(run: Launch, repeat: int) -> float:
    """Median of :func:`times`."""
    return sorted(times(run, repeat))[repeat // 2]


def bandwidth() -> float:
    """Bytes a second that the device's memory can move: the best of three medians.

    Of a copy and of an addition, bytes read and written; of a sum, bytes read; over 4 GiB of
    random floats, or less where memory is short. None of them is the best on every device.
    """
    n = min(1 << 30, torch.cuda.mem_get_info()[0] // 16)  # two tensors in half of what is free
    source = torch.randn(n, device="cuda")
    target = torch.empty_like(source)
    size = source.nbytes
    ways: list[tuple[int, Launch]] = [
        (2 * size, partial(target.copy_, source)),
        (2 * size, partial(torch.add, source, 1, out=target)),
        (size, source.sum),
    ]
    return max(moved / (milliseconds([launch]) * 1e-3) for moved, launch in ways)
