"""Cases of the CPU kernels under the address and undefined-behaviour sanitizers.

``tests/property/test_cpu_kernels.py`` runs this where the sanitizer is loaded.
"""

from __future__ import annotations

import kernel_cases
import torch

from skv_compile.lowering.cpu import kernels as cpu
from skv_compile.lowering.cpu import library

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def main() -> None:
    """Every case, in the best variant of this CPU; prints how many."""
    found = library.open_library(library.build(library.possible()[0], FLAGS))
    cpu.load = lambda: found
    for case in kernel_cases.CASES.values():
        one = kernel_cases.forward(torch.device("cpu"), **case)
        want = one.reference()
        assert kernel_cases.error(cpu.attend(*one), want) < 1e-3
        state, layout = one.state, one.layout
        if layout.observed:
            assert cpu.retain(one.q[:, :, :1], one.position[:1], state.queries, state.meta, layout)
        one_token = (one.k[:, :, :1], one.v[:, :, :1], one.mask, one.position[:1])
        cpu.append(*one_token, state.exact_keys, state.exact_values, state.meta, layout)
    print(len(kernel_cases.CASES))


main()
