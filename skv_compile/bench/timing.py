"""Medians of CUDA graphs, and what memory can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def copy_bandwidth() -> float:
    """Bytes a second of a copy on the device, read and written."""
    size = 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / (milliseconds([lambda: target.copy_(source)]) * 1e-3)
