# SPDX-License-Identifier: Apache-2.0
"""--workers and --ray: who searches, and who is lost in the middle, changes no bit."""

import os
import signal

import pytest
from safetensors.torch import load_file

from quip_vllm.quantizer.rounding.searchers import searchers
from quip_vllm.quantizer.run import quantize


@pytest.fixture
def compared(tiny_model, make_settings, tmp_path):
    """Quantizes with searchers, and without; returns what the report says of them."""

    def compare(others):
        settings = make_settings(tiny_model("Llama"), code="hyb", two_sided=True, lm_head=2, embedding=2)
        alone = quantize(settings, tmp_path / "alone")
        report = quantize(settings, tmp_path / "out", searchers=others)
        expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
        assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)
        assert alone["searched"] == {}
        return report["searched"]

    return compare


def losing(others, lose, after):
    """Calls `lose` before one of the searches."""
    search, calls = others.search, iter(range(1 << 30))

    def searched(*args):
        if next(calls) == after:
            lose()
        return search(*args)

    others.search = searched


@pytest.mark.exhaustive
def test_processes_of_which_one_is_killed(compared):
    with searchers(2, None) as others:
        losing(others, lambda: os.kill(min(others._pool._processes), signal.SIGKILL), 5)
        searched = compared(others)
        assert len(searched) >= 3 and min(searched.values()) > 0  # a killed process ends its pool


def test_processes_that_find_nothing(monkeypatch):
    monkeypatch.setattr("quip_vllm.quantizer.rounding.searchers.search_piece", os.execl)
    with searchers(1, None) as others, pytest.raises(ValueError, match="--workers is 1: the processes end before"):
        others._threads = ""  # execl wants words alone
        others.search("/bin/false", "false", [""])


@pytest.mark.parametrize(
    ("asked", "said"),
    [((0, None), "--workers is 0: give at least 1"), ((2, "auto"), "give one of them"), ((None, "1.2.3"), "--ray")],
)
def test_what_cannot_be(asked, said):
    with pytest.raises(ValueError, match=said), searchers(*asked):
        pass


@pytest.mark.exhaustive
def test_a_cluster_of_which_a_node_is_lost(compared):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        with searchers(None, cluster.address) as others:
            assert others.count == 2
            losing(others, lambda: cluster.remove_node(node, allow_graceful=False), 5)
            assert len(compared(others)) >= 2
    finally:
        cluster.shutdown()
