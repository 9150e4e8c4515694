# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the CUDA kernels are caught: each mutation makes a part of tests/ops fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import compiled
from mutants import link
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
RESULTS, ORDERS = "linear_is_the_dequantized_weight and 1mad-2", "order_of_threads and 1mad-1"
ROUTED = "rows_that_the_cuda_kernels_route"
FUSED = "gemm_1mad", "the_epilogue_gives and 1mad-2"
ONE_LAUNCH = "gemm_1mad", "one_launch_gives and 1mad-2"
FUSED_ORDERS = "gemm_1mad", "order_of_threads_does_not_show_in_the_epilogue"
MUTATIONS = {  # file, what is there, what it becomes, the object to compile again, the tests that see it
    "swapped A registers": (
        "trellis_stream.h",
        "? place / 2 + place % 2 * 2 : place;",
        "? place / 2 + place % 2 * 2 : place ^ 1;",
        "gemm_1mad",
        RESULTS,
    ),
    "another row's next": ("trellis_stream.h", "lane + 4 :", "lane + 8 :", "gemm_1mad_by_rows", "row_major and 2-1mad"),
    "swapped B registers": ("decode_gemm.h", "[2 * v], b.x, b.y", "[2 * v], b.y, b.x", "gemm_1mad", RESULTS),
    "shifted index": ("decode_gemm.h", "lane, words[r]);", "lane ^ 1, words[r]);", "gemm_1mad", RESULTS),
    "wrong selector": ("trellis_stream.h", "0x4421 : 0x4410", "0x4421 : 0x4401", "gemm_1mad", RESULTS),
    "wrong sign": ("output.h", "e[j | half] = a - b", "e[j | half] = b - a", "rotation", RESULTS),
    "wrong sign in a slice": (
        "rotation.cu",
        "slice & half ? e[i] - e[i + half]",
        "slice & half ? e[i + half] - e[i]",
        "rotation",
        RESULTS,
    ),
    "a slice without its total": ("output.h", "i < out.slices;", "i < out.slices - 1;", "rotation", RESULTS),
    "wrong place of a column": (
        "input.h",
        "t * 16 + c / 2 % 2 * 8 + c / 8 % 2 * 4",
        "t * 16 + c / 8 % 2 * 8 + c / 2 % 2 * 4",
        "rotation",
        RESULTS,
    ),
    "copies of another word": (
        "table_copies.h",
        "i + lane / (kCopies / 4)",
        "i + lane / kCopies",
        "gemm_hyb",
        "linear_is_the_dequantized_weight and hyb-2",
    ),
    "no barrier": (
        "decode_gemm.h",
        "copy_wait<kStages - 2>();\n    device::sync_block();",
        "copy_wait<kStages - 2>();",
        "gemm_1mad",
        ORDERS,
    ),
    "an output of the neighbour": (
        "decode_gemm.h",
        "g.unit, row0 + row, output,",
        "g.unit, row0 + row, output ^ 1,",
        *FUSED,
    ),
    "a row's offset of another": ("decode_gemm.h", "total_of(out, row0 + row)", "total_of(out, row0)", *FUSED),
    "no barrier before the butterflies": (
        "decode_gemm.h",
        "  device::sync_block();\n  walsh",
        "  walsh",
        *FUSED_ORDERS,
    ),
    "no barrier in the exchange": (
        "decode_gemm.h",
        "    device::sync_block();\n  }\n  // From here",
        "  }\n  // From here",
        *FUSED_ORDERS,
    ),
    "one part of k less": ("decode_gemm.h", "i < g.splits; ++i)", "i < g.splits - 1; ++i)", *ONE_LAUNCH),
    "the sum of a row of another part": ("decode_gemm.h", "+ int(blockIdx.y)] = total", "] = total", *ONE_LAUNCH),
    "the counters of the call before": (
        "bindings_linear.cu",
        "if (alone && !whole) problem = device::clear(",
        "if (false) problem = device::clear(",
        "bindings_linear",
        "one_launch_gives and 1mad-2",
    ),
    "no barrier behind the largest": (
        "input.h",
        "  device::sync_block();\n  const int runs",
        "  const int runs",
        "gemm_1mad",
        "order_of_threads_and_blocks",
    ),
    "the last of equal walks": (
        "encode_trellis.cu",
        "if (cost < best[j])",
        "if (cost <= best[j])",
        "encode_trellis",
        "walks_are_those and hyb-2",
    ),
    "the last of equally near points": (
        "encode_lattice.cu",
        "if (score > best)",
        "if (score >= best)",
        "encode_lattice",
        "nearest_points",
    ),
    "no barrier behind the fragments": (
        "wide_gemm.h",
        "    W::store(a, fragments, warp);\n    device::sync_block();",
        "    W::store(a, fragments, warp);",
        "gemm_mul1_swapped",
        "order_of_sums_of_many_rows and mul1",
    ),
    "rows of the neighbour": (
        "input.h",
        "* rows + row) * 16 + place / 16 % 4 * 4",
        "* rows + (row ^ 1)) * 16 + place / 16 % 4 * 4",
        "rotation",
        "many_rows_in and mul1",
    ),
    "copies that no product sees": (
        "wgmma_gemm.h",
        "    device::show_copies();\n",
        "",
        "wgmma",
        "many_rows_in and mul1",
    ),
    "registers of a product under way": (
        "wgmma_gemm.h",
        "products_wait<1>();",
        "products_wait<2>();",
        "wgmma",
        "many_rows_in and mul1",
    ),
    "x of a product under way": ("wgmma_gemm.h", "kStages = 4;", "kStages = 3;", "wgmma", "many_rows_in and mul1"),
    "signs of another expert": ("rotation.cu", "r.su + int64_t(max(own.expert, 0)) * k", "r.su", "rotation", ROUTED),
    "words of another expert": ("decode_gemm.h", "g.packed + expert * g.expert_words", "g.packed", "gemm_1mad", ROUTED),
    "sv of another expert": ("output.h", "sv += int64_t(max(", "sv += 0 * int64_t(max(", "rotation", ROUTED),
    "no wait": ("decode_gemm.h", "device::copy_wait<kStages - 2>();", "", "gemm_1mad", ORDERS),
}


@pytest.fixture(scope="module")
def objects():
    return compiled("emulator") / "CMakeFiles" / "quip_vllm_cuda.dir"


def mutated_library(folder, objects, file, old, new, unit):
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    headers = [f"-I{path}" for path in include_paths()]
    return link(folder, objects, file, old, new, unit, ["-shared", *headers, *libraries], "libquip_vllm_cuda.so")


def outcome(library, tests):
    files = [str(one) for one in sorted(ROOT.glob("tests/ops/test_emulated*.py"))] + ["tests/ops/test_experts.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    result = subprocess.run(
        [*command, "-k", tests, "--cuda-library", str(library)], cwd=ROOT, capture_output=True, text=True
    )
    return result.returncode, result.stdout[-2000:]


def cases():
    """One mutation that a result shows and one that the order of threads shows; the others are exhaustive."""
    usual = ("swapped B registers", "no barrier")
    return [pytest.param(name, marks=[] if name in usual else pytest.mark.exhaustive) for name in MUTATIONS]


@pytest.mark.parametrize("mutation", cases())
def test_a_mutation_is_caught(objects, tmp_path, mutation):
    *change, tests = MUTATIONS[mutation]
    code, text = outcome(mutated_library(tmp_path, objects, *change), tests)
    assert code == 1 and "1 failed" in text, text
