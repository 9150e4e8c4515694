# SPDX-License-Identifier: Apache-2.0
"""The emulator that runs the CUDA kernels on a CPU: emulator_check.cpp's right kernels are right, its faults show."""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = sorted((ROOT / "kernels" / "emulator").glob("*.cpp"))
CHECK = ROOT / "tests" / "kernels" / "emulator_check.cpp"

ORDERS = ("roundrobin", "depthfirst", "reverse", "random:1", "random:2")
SCHEDULES = [f"{copies},{order}" for copies in ("deferred", "eager") for order in ORDERS]
RIGHT = ("sum", "sums_in_os_threads", "pipeline", "pipeline_of_one", "pipeline_of_three", "exchange", "product_async")
PRODUCTS = ("product_of_bytes", "product_of_halves")
SANITIZERS = {
    "thread": ("-O1", "-g", "-fsanitize=thread"),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}


@functools.cache
def build(sanitizer=None):
    """ThreadSanitizer must not see the emulator, which it would take for one thread that does everything."""
    kept = tempfile.TemporaryDirectory(prefix="emulator")
    folder = Path(kept.name)
    flags = SANITIZERS.get(sanitizer, ("-O2",))
    compiler = (os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror")
    own_flags = ("-O2",) if sanitizer == "thread" else flags
    subprocess.run([*compiler, *own_flags, "-c", *EMULATOR], cwd=folder, check=True)
    objects = [folder / f"{file.stem}.o" for file in EMULATOR]
    include = f"-I{ROOT / 'kernels' / 'cuda'}"
    subprocess.run([*compiler, *flags, include, CHECK, *objects, "-o", folder / "check", "-pthread"], check=True)
    return folder / "check", kept


def run(name, settings="", sanitizer=None, **arguments):
    environment = os.environ | {"QUIP_VLLM_EMULATOR": settings, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    environment |= {"TSAN_OPTIONS": "exitcode=66"}
    return subprocess.run([build(sanitizer)[0], name], env=environment, capture_output=True, timeout=120, **arguments)


def answer(name, settings=""):
    result = run(name, settings, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right_in_any_order(name, schedule):
    assert answer(name, schedule) == "right"


@pytest.mark.parametrize("name", (*PRODUCTS, "integers"))
def test_arithmetic_is_that_of_a_plain_loop(name):
    assert answer(name) == "right"


def test_a_product_takes_what_registers_hold_when_it_is_waited_for():
    found = {schedule: answer("product_not_waited_for", schedule) for schedule in SCHEDULES}
    assert found == {schedule: "wrong" if "deferred" in schedule else "right" for schedule in SCHEDULES}


@pytest.mark.parametrize("name", ("no_sync_before_use", "no_sync_before_reuse", "no_wait", "no_sync_warp"))
def test_a_missing_synchronisation_gives_a_wrong_result(name):
    found = [schedule for schedule in SCHEDULES if answer(name, schedule) == "wrong"]
    assert any(schedule.startswith("deferred") for schedule in found)
    assert len(found) >= 4, found


def lines_of(*comments):
    lines = CHECK.read_text().splitlines()
    return [1 + next(i for i, line in enumerate(lines) if line.endswith(f"// {comment}")) for comment in comments]


@pytest.mark.exhaustive
@pytest.mark.parametrize("copies", ("deferred", "eager"))
@pytest.mark.parametrize(
    "name, places",
    [
        ("no_sync_before_use", ("the copy", "the use")),
        ("no_sync_before_reuse", ("the copy", "the use")),
        ("no_sync_warp", ("the exchange",)),
        ("blocks_write_the_same_word", ("the same word",)),
    ],
)
def test_thread_sanitizer_names_the_lines_of_a_race(name, places, copies):
    result = run(name, copies, "thread", text=True)
    assert result.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    for line in lines_of(*places):
        assert f"{CHECK.name}:{line}" in result.stderr


FAULTS = {
    "divergent_shuffle": (
        ", thread 7: reaches shuffle at ",
        ", while thread 0 of its warp waits in shuffle at ",
    ),
    "lane_left": (
        ", thread 0: deadlock: it waits for its warp in shuffle at ",
        ", but thread 9 has left the kernel",
    ),
    "no_such_lane": (
        ", thread 0: deadlock: it waits for its warp in shuffle at ",
        ", but thread 8 does not exist",
    ),
    "two_barriers": (
        ", thread 32: reaches sync_block at ",
        ", while thread 0 of its block waits in sync_block at ",
    ),
    "barrier_in_shuffle": (
        ", thread 32: deadlock: it waits for its warp in shuffle at ",
        ", but thread 40 waits in sync_block at ",
    ),
    "barrier_left": (
        ", thread 0: deadlock: it waits for its block in sync_block at ",
        ", but thread 5 has left the kernel",
    ),
    "overflow": (": wrote past its 48 bytes of shared memory, to byte 63",),
    "misaligned_copy": (", thread 0: copy_async between addresses that are not aligned to 16, at ",),
    "copy_outside": (", thread 0: copy_async to a place outside shared memory, at ",),
    "misaligned_load": (", thread 0: load16 from an address that is not aligned to 16, at ",),
    "misaligned_store": (", thread 0: store16 to an address that is not aligned to 16, at ",),
    "product_not_begun": (", thread 0: multiply_add_async without products_begin since the last products_commit, at ",),
    "product_of_hidden_copies": (
        ", thread 0: multiply_add_async behind a barrier that a thread reached without show_copies, at ",
    ),
    "product_outside": (", thread 0: multiply_add_async of what is outside shared memory, at ",),
    "misaligned_words": (", thread 0: load_words from an address that is not aligned to its loads, at ",),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_launch_with_a_sentence(name):
    sentence = answer(name)
    assert sentence.startswith("kernel ")
    assert "_kernel, block (0, 0, 0)" in sentence
    position = 0
    for part in FAULTS[name]:
        assert part in sentence[position:], sentence
        position = sentence.index(part, position) + len(part)
        if part.endswith(" at "):
            assert sentence[position:].startswith(f"{CHECK}:"), sentence


def test_a_launch_that_no_gpu_would_start_is_refused():
    assert answer("too_many_threads") == (
        "kernel overflow_kernel: no GPU can start this grid, block or size of shared memory"
    )


@pytest.mark.parametrize("settings", ("lazy", "eager,random", "random:x", "random:"))
def test_settings_that_do_not_exist_are_named_with_those_that_do(settings):
    expected = "it takes deferred, eager, roundrobin, depthfirst, reverse, random:SEED"
    assert answer("sum", settings) == (f'QUIP_VLLM_EMULATOR: unknown word "{settings.split(",")[-1]}"; {expected}')


@pytest.mark.exhaustive
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", (*RIGHT, *PRODUCTS))
def test_right_kernels_are_clean_under_the_sanitizers(name, sanitizer):
    for copies in ("deferred", "eager"):
        result = run(name, f"{copies},random:3", sanitizer, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "right", "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("name", ("barrier_in_shuffle", "misaligned_copy", "overflow"))
def test_abandoned_threads_leave_nothing_to_the_sanitizers(name, sanitizer):
    result = run(name, "", sanitizer, text=True)
    assert result.returncode == 0
    assert result.stderr == ""
    assert FAULTS[name][-1] in result.stdout


def same_bits(ours, reference):
    """NaN is NaN, whichever."""
    both_nan = np.isnan(ours) & np.isnan(reference)
    unsigned = f"u{ours.itemsize}"
    return bool((both_nan | (ours.view(unsigned) == reference.view(unsigned))).all())


@pytest.fixture(scope="module")
def conversions():
    generator = np.random.default_rng(0)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    up = np.nextafter(halves, np.float32(np.inf))
    middles = (halves.view(np.uint32) + (1 << 12)).view(np.float32)  # halfway to the next half
    small = (generator.integers(0, 1 << 13, 65536, dtype=np.uint32) << 13).view(np.float32)
    near = (generator.standard_normal(65536) * 3).astype(np.float32)
    steps = ((generator.integers(-(2**26), 2**26, 65536) * 2 + 1) / 2).astype(np.float32)  # halves of integers
    bits = generator.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    ends = np.array([2.0**31, -(2.0**31), 2.0**31 - 128, 65519.996, 65520, 2.0**-25, np.inf, -np.inf, np.nan])
    subnormal = np.arange(1, 4096, dtype=np.float32) * np.float32(2.0**-26)
    x = np.concatenate([halves, up, middles, small, near, steps, bits, ends.astype(np.float32), subnormal])
    data = run("convert", input=x.tobytes()).stdout
    sizes = {"from_half": np.float32, "from_bfloat": np.float32, "to_half": np.float16, "to_bfloat": np.uint16}
    sizes |= {"to_int": np.int32, "add_halves": np.uint32}
    tables = {"x": x}
    for name, kind in sizes.items():
        count = 65536 if name.startswith("from") else len(x)
        tables[name] = np.frombuffer(data, kind, count)
        data = data[tables[name].nbytes :]
    assert not data
    return tables


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_halves_are_those_of_numpy(conversions):
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert same_bits(conversions["from_half"], every.astype(np.float32))
    assert same_bits(conversions["to_half"], conversions["x"].astype(np.float16))
    a = conversions["x"].view(np.uint32)
    pairs = [v.view(np.uint16).view(np.float16) for v in (a, a * np.uint32(2654435761))]
    assert same_bits(conversions["add_halves"].view(np.float16), pairs[0] + pairs[1])


def test_bfloats_are_those_of_torch(conversions):
    every = torch.arange(65536).to(torch.int16).view(torch.bfloat16)
    assert same_bits(conversions["from_bfloat"], every.float().numpy())
    expected = torch.from_numpy(conversions["x"].copy()).to(torch.bfloat16).float().numpy()
    ours = (conversions["to_bfloat"].astype(np.uint32) << 16).view(np.float32)
    assert same_bits(ours, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_integers_are_the_nearest_and_saturate(conversions):
    rounded = np.nan_to_num(np.rint(conversions["x"].astype(np.float64)), nan=0.0)
    assert (conversions["to_int"] == np.clip(rounded, -(2.0**31), 2.0**31 - 1)).all()
