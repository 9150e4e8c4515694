# SPDX-License-Identifier: Apache-2.0
"""`make sanitize`: the CPU library under the address, undefined-behaviour and thread sanitizers.

panels.cpp runs the kernels over std::thread: the thread sanitizer would report the barriers of libgomp, which is not
instrumented, as races. The op tests run the bindings, over the kernels of the best tier of the build. A build leaves
out a tier whose sources are those of others (QUIP_INSTEAD in CMakePresets.json): avx512 has the floats of avx512_vnni
and the integers of avx2, and no sanitizer sees through the tile registers of amx, which amx_emulated does without.
sanitized() also leaves out what this CPU does not run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sanitized import INSTEAD, sanitized
from tiers import TIERS, runs_here

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
TESTS = [str(path) for path in (*ROOT.glob("tests/ops/test_cpu*.py"), ROOT / "tests/ops/test_library.py")]
SLOW = ("distortion", "beats", "opcheck", "compiles", "two_processes", "targets_outside", "only_the_packed")


@pytest.fixture(autouse=True, scope="module")
def builds(request):
    sanitized(request.config)


def run(*command, **environment):
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def run_python(*arguments, **environment):
    """Python with the runtimes of the sanitizers; they look for C++ exceptions at start, hence libstdc++."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [run(compiler, f"-print-file-name={name}").stdout.strip() for name in names]
    environment |= {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    return run(sys.executable, *arguments, **environment)


def test_op_tests_are_clean():
    library = BUILD / "address" / "libquip_vllm_cpu.so"
    chosen = " and ".join(f"not {name}" for name in SLOW)
    arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", chosen, "-m", "not exhaustive")
    result = run_python(*arguments, "--cpu-library", str(library))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert " passed" in result.stdout


def at_every_tier(*cases):
    """(sanitizer, ...) with the tiers of its build that this CPU runs."""
    return [(*case, tier) for case in cases for tier in TIERS if runs_here(tier) and tier not in INSTEAD[case[0]]]


@pytest.mark.parametrize(("sanitizer", "tier"), at_every_tier(("address",), ("thread",)))
def test_threads_give_the_same_bits_and_no_report(sanitizer, tier):
    result = run(str(BUILD / sanitizer / "panels"), tier)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]


PLANTED = [
    ("address", "read", "ERROR: AddressSanitizer"),
    ("address", "misaligned", "misaligned address"),
    ("thread", "race", "data race"),
]


@pytest.mark.parametrize(("sanitizer", "error", "report", "tier"), at_every_tier(*PLANTED))
def test_a_planted_error_is_caught(sanitizer, error, report, tier):
    result = run(str(BUILD / sanitizer / "panels_planted"), tier, error)
    assert result.returncode != 0
    assert report in result.stderr


def test_the_address_sanitizer_is_alive_in_python():
    write = "ctypes.CDLL(None).memset(ctypes.c_void_p(t.data_ptr()), 0, 65)"
    result = run_python("-c", f"import ctypes, torch; t = torch.zeros(16); {write}")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
