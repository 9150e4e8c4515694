# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles decode_gemm to, without a GPU: it has tensor cores, no spills, little shared memory."""

import re
import subprocess
from pathlib import Path

import pytest
from random_layers import RATES

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quip_vllm.ops.triton.decode_gemm import decode_gemm_kernel
from quip_vllm.ops.triton.launch import code_and_order, gemm_options, numbers, own_code
from quip_vllm.ops.triton.shapes import WARPS, candidates

TARGETS = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = 99 * 1024
"""What a thread block of the smallest of these GPUs may have."""

USUAL = [("hyb", 2, 8, target) for target in TARGETS] + [("e8p", 4, 64, 80), ("1mad", 2, 64, 90), ("lut", 8, 8, 80)]
USUAL += [("mul1_swapped", 3, 8, 80), ("mul1_half_swapped", 3, 8, 80)]
USUAL += [("mcg_swapped", 4, 64, 90), ("grid", 5, 64, 80), ("hyb_by_rows", 3, 8, 80)]
USUAL += [("1mad_by_rows", 3, 64, 80), ("table_by_rows", 4, 8, 90), ("pairs_by_rows", 2, 64, 80)]
EVERY = [(code, bits, (8, 64)[bits % 2], (80, 90)[bits // 2 % 2]) for code, bits in RATES]
"""Each rate with one of the four pairs of rows and target, of which four rates of a code have them all."""


def compiled(code, bits, rows, target, routed):
    """The kernel for up to `rows` rows on sm_`target`; pointers are aligned to 16 bytes, integers unknown."""
    shape = candidates(rows, WARPS[target // 10])[0]
    table = "*fp16" if own_code(code) in ("lut", "table") else "*u32"
    signature = {"packed": "*u32", "table": table, "x": "*fp16", "partial": "*fp32", "order": "*i64", "blocks": "*i32"}
    numbers_of_it = ("expert_words", "expert_table", "m", "tiles", "chunks", "split_chunks")
    signature |= dict.fromkeys(numbers_of_it, "i32")
    constants = code_and_order(code) | {"BITS": bits, "SECOND": numbers(code, bits)[2], "PROJECTIONS": ()}
    constants |= {"WARPS": shape.warps, "BM": shape.rows, "UNROLL": shape.unroll, "ROUTED": routed}
    names = decode_gemm_kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    whole = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(decode_gemm_kernel, whole, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=gemm_options(code, shape))


def check(folder, code, bits, rows, target, routed=False):
    kernel = compiled(code, bits, rows, target, routed)
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([str(tool), "-res-usage", str(file)], check=True, capture_output=True, text=True).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage
    assert kernel.metadata.shared <= SHARED_BYTES
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in kernel.asm["ptx"]
    assert ("dp4a" in kernel.asm["ptx"]) == (own_code(code) in ("1mad", "mul1", "mul1_half"))


@pytest.mark.parametrize(("code", "bits", "rows", "target"), USUAL)
def test_machine_code(tmp_path, code, bits, rows, target):
    check(tmp_path, code, bits, rows, target)


@pytest.mark.parametrize(("code", "bits", "rows", "target"), [("hyb", 2, 8, 80), ("e8p", 2, 64, 90), ("lut", 3, 8, 80)])
def test_machine_code_of_experts(tmp_path, code, bits, rows, target):
    check(tmp_path, code, bits, rows, target, routed=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("code", "bits", "rows", "target"), EVERY)
def test_machine_code_of_every_format(tmp_path, code, bits, rows, target):
    check(tmp_path, code, bits, rows, target)
