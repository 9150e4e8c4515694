# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of one thread for rounding a random matrix: the factors, LDLQ on one side and on two, and their searches.

Usage: python scripts/bench/bench_rounding.py FORMAT OUTPUTSxINPUTS...      (as quip_sharp-2 2048x2048)
"""

import sys
import time

import torch
from benchmarking import FORMATS
from torch import Tensor

from quip_vllm.quantizer.rounding.encoders import make_encoder
from quip_vllm.quantizer.rounding.ldl import feedback
from quip_vllm.quantizer.rounding.ldlq import block_ldlq, two_sided_ldlq


def main(name: str, *sizes: str) -> int:
    """Prints a line a matrix; returns the exit code."""
    torch.set_num_threads(1)
    stored = FORMATS[name]
    encoder = make_encoder(stored.code, stored.bits)
    searching = 0.0
    search = encoder.encode

    def encode(block: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal searching
        begin = time.process_time()
        found = search(block)
        searching += time.process_time() - begin
        return found

    encoder.encode = encode  # type: ignore[method-assign]
    for size in sizes:
        n, k = map(int, size.split("x"))
        draw = torch.Generator().manual_seed(0)
        hessians = [torch.randn(2 * side, side, generator=draw) for side in (k, n)]
        weight = torch.randn(n, k, generator=draw) * encoder.rms
        begin = time.process_time()
        inputs, outputs = (
            feedback(x.T @ x / len(x), block)[0]
            for x, block in zip(hessians, (encoder.columns, encoder.rows), strict=True)
        )
        said = f"{name} {size}: factors {time.process_time() - begin:.2f}"
        for what, call in (
            ("one side", lambda w=weight, i=inputs: block_ldlq(w, i, encoder)),
            ("two sides", lambda w=weight, i=inputs, o=outputs: two_sided_ldlq(w, i, o, encoder)),
        ):
            searching, begin = 0.0, time.process_time()
            call()
            said += f", {what} {time.process_time() - begin:.2f} (search {searching:.2f})"
        print(said, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else print(__doc__) or 2)
