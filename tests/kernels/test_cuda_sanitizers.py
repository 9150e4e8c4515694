# SPDX-License-Identifier: Apache-2.0
"""`make sanitize`: the emulated CUDA kernels under the address, undefined-behaviour and thread sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest
from mutants import link
from sanitized import sanitized

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
# The codes and rates of the presets of kernels/CMakePresets.json.
ALL = [
    f"{code} {bits}"
    for code in ("1mad", "1mad_int8", "3inst_swapped", "lut", "pairs_by_rows")
    for bits in (1, 2, 3, 4, 7)
]
ALL += [f"{code} {bits}" for code in ("hyb", "hyb_large") for bits in range(1, 5)]
ALL += [f"grid {bits}" for bits in (2, 3, 4, 7)]
ALL += [f"{code} {bits}" for code in ("e8p", "e8p_large") for bits in (2, 3, 4)]
RACES = ("1mad 2 1mad_int8 2", "hyb 3", "e8p 3", "e8p_large 2")


@pytest.fixture(autouse=True, scope="module")
def builds(request):
    sanitized(request.config)


def run(program, cases, order):
    environment = {**os.environ, "QUIP_VLLM_EMULATOR": order, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return subprocess.run([str(program), *cases.split()], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ["deferred", "eager,reverse"])
def test_no_address_is_wrong(order):
    result = run(BUILD / "address" / "gemm_check", " ".join(ALL), order)
    assert result.returncode == 0 and not result.stderr, result.stderr[-6000:]
    answers = [line.split(": ", 1)[1] for line in result.stdout.splitlines()]
    alone = [case for case in ALL if int(case[-1]) <= 4 and not case.startswith(("1mad_int8", "lut", "pairs_by_rows"))]
    wide = [case for case in alone if int(case[-1]) >= 2]
    assert len(answers) == 7 * len(ALL) + 2 * len(alone) + len(wide) and all(answer.isdigit() for answer in answers)


@pytest.mark.parametrize(("cases", "order"), [*((cases, "deferred") for cases in RACES), (RACES[0], "eager")])
def test_no_race(cases, order):
    result = run(BUILD / "thread" / "gemm_check", cases, order)
    assert result.returncode == 0 and not result.stderr, result.stderr[-6000:]


def test_a_missing_barrier_is_a_race(tmp_path):
    barrier = "copy_wait<kStages - 2>();\n    device::sync_block();"
    change = ("decode_gemm.h", barrier, "copy_wait<kStages - 2>();", "gemm_1mad")
    objects = BUILD / "thread" / "CMakeFiles" / "gemm_check.dir"
    program = link(tmp_path, objects, *change, ["-g1", "-fsanitize=thread"], "gemm_check")
    result = run(program, "1mad 2", "deferred")
    assert result.returncode != 0
    assert "data race" in result.stderr and "decode_gemm_kernel" in result.stderr
