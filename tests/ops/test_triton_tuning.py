# SPDX-License-Identifier: Apache-2.0
"""QUIP_VLLM_TRITON_TUNE: what is timed, when, and what is launched then. Kernels and clock are substituted."""

import logging

import pytest
import torch
from random_layers import random_layer

pytest.importorskip("triton")

from quip_vllm.ops import LinearSpec
from quip_vllm.ops.triton import launch, rotation, shapes
from quip_vllm.ops.triton.backend import TritonBackend
from quip_vllm.ops.triton.shapes import ROWS, WARPS, Shape, candidates

SPEC = LinearSpec("hyb", 2, 80, (80, 16))


class Kernel:
    """Launches of decode_gemm, noted and not run: (grid, Shape)."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *_, WARPS, BM, UNROLL, **named: self.launched.append((grid, Shape(WARPS, BM, UNROLL)))


class Nothing:
    def __getitem__(self, grid):
        return lambda *_, **named: None


class Clock:
    """Says that candidate `fastest` of each number of rows takes the least; shapes: all that it timed."""

    def __init__(self, launched, fastest):
        self.launched, self.fastest, self.shapes = launched, fastest, []

    def __call__(self, call):
        call()
        grid, shape = self.launched.pop()
        rows = grid[2] * shape.rows
        self.shapes.append((rows, shape))
        return 0.1 if [timed for timed, _ in self.shapes].count(rows) == self.fastest + 1 else 1.0


@pytest.fixture
def launched(monkeypatch):
    noted = []
    monkeypatch.setattr(shapes, "_timed", {})
    for name in [name for name in vars(rotation) if name.endswith("_kernel")]:
        monkeypatch.setattr(rotation, name, Nothing())
    monkeypatch.setattr(launch, "decode_gemm_kernel", Kernel(noted))
    return noted


@pytest.fixture
def tuned(monkeypatch, launched):
    """tuned(fastest): the clock of a process that tunes."""

    def tuned(fastest):
        monkeypatch.setenv("QUIP_VLLM_TRITON_TUNE", "1")
        clock = Clock(launched, fastest)
        monkeypatch.setattr(shapes, "milliseconds", clock)
        return clock

    return tuned


def refuse(call):
    raise AssertionError("timed")


def prepared(spec=SPEC):
    backend = TritonBackend()
    layer = backend.prepare(spec, random_layer(spec))
    return lambda m: layer.linear(torch.zeros(m, spec.in_features))


@pytest.mark.parametrize("fastest", range(6))
def test_the_fastest_is_launched(fastest, tuned, launched):
    tuned(fastest)
    linear = prepared()
    for m, rows in [(1, 8), (8, 8), (9, 16), (32, 32), (33, 64), (130, 64)]:
        launched.clear()
        linear(m)
        among = candidates(rows, WARPS[8])
        wanted = among[fastest if fastest < len(among) else 0]
        programs = -(-5 // wanted.warps) + 1  # a program has tiles of one part
        assert launched == [((programs, 1, -(-m // wanted.rows)), wanted)]


def test_every_candidate_is_timed_once_a_process_and_none_by_a_call(tuned):
    clock = tuned(1)
    linear = prepared()
    assert clock.shapes == [(rows, shape) for rows in ROWS for shape in candidates(rows, WARPS[8])]
    linear(1), linear(40), prepared()(7)
    assert len(clock.shapes) == sum(len(candidates(rows, WARPS[8])) for rows in ROWS)
    prepared(LinearSpec("hyb", 2, 80, (96, 16)))
    assert len(clock.shapes) == 2 * sum(len(candidates(rows, WARPS[8])) for rows in ROWS)


@pytest.mark.parametrize("value", ["", "0"])
def test_the_table_is_the_default(value, monkeypatch, launched):
    monkeypatch.setenv("QUIP_VLLM_TRITON_TUNE", value)
    monkeypatch.setattr(shapes, "milliseconds", refuse)
    linear = prepared()
    for m, shape in [(1, (4, 8, 2)), (16, (4, 16, 2)), (17, (4, 32, 1)), (64, (4, 64, 1))]:
        launched.clear()
        linear(m)
        assert [used for _, used in launched] == [shape]


def test_nothing_is_timed_while_a_graph_is_captured(tuned, monkeypatch, launched):
    tuned(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(shapes, "milliseconds", refuse)
    prepared()(1)
    assert launched[0][1] == (4, 8, 2)


def test_the_choice_is_logged(tuned, caplog):
    tuned(1)
    with caplog.at_level(logging.INFO, logger=shapes.__name__):
        prepared()
    assert len(caplog.messages) == len(ROWS)
    assert caplog.messages[0] == (
        "quip_vllm: hyb at 2 bits, outputs (80, 16), 80 inputs, up to 8 rows on cpu: "
        "warps, rows, unroll (2, 8, 2) take 0.1000 ms, the table's (4, 8, 2) 1.0000 ms"
    )


def test_another_value_is_refused(monkeypatch, launched):
    monkeypatch.setenv("QUIP_VLLM_TRITON_TUNE", "yes")
    with pytest.raises(ValueError, match="QUIP_VLLM_TRITON_TUNE is 'yes': give 1 or 0, or unset it"):
        prepared()


@pytest.mark.parametrize(("major", "warps"), WARPS.items())
def test_candidates_fit_the_registers_and_multiply_alike(major, warps):
    """65,536 registers a block; wgmma and tcgen05 need four warps."""
    for rows in ROWS:
        for shape in candidates(rows, warps):
            assert shape.rows in ROWS and shape.rows <= rows
            for code in ("hyb", "lut"):
                assert 32 * shape.warps * launch.gemm_options(code, shape).get("maxnreg", 255) <= 65536
            assert major not in (9, 10) or shape.warps < 4


def test_parts_of_k_do_not_depend_on_the_choice(tuned):
    spec = LinearSpec("hyb", 2, 4096, (272,))
    device = torch.device("cpu")
    usual = shapes.split_chunks(spec, device)
    assert usual == 11  # of 64 chunks: 17 tiles are 5 programs of the table's 4 warps, which leave 6 parts
    tuned(1)
    prepared(spec)
    assert {shape.warps for shape in shapes._timed.values()} == {2}
    assert shapes.split_chunks(spec, device) == usual
