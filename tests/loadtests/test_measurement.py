# SPDX-License-Identifier: Apache-2.0
"""The load test reports what a server of known rate really emitted: locust in a process of its own, as users run it."""

import csv
import importlib.util
import json
import re
import socket
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numerics import LOADTEST_RELATIVE

from loadtests.profiles import PROFILES

# Importing locust would replace the standard library's threads in this process.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="pip install 'quip-vllm[dev]'")

ROOT = Path(__file__).parents[2]
TOKENS = 16
USERS = 3
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fake_server.py")), str(listener.fileno())],
            pass_fds=[listener.fileno()],
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            _get(f"{url}/v1/models")  # waits in the listener's queue until the server is up
            yield url
        finally:
            process.terminate()
            process.wait(timeout=10)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


def _locust(*options: str) -> subprocess.CompletedProcess[str]:
    files = "loadtests/locustfile.py,tests/loadtests/stamped_requests.py"
    command = [sys.executable, "-m", "locust", "-f", files, "--headless", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def _run(url: str, folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, str]]]:
    path = folder / "metrics.csv"
    done = _locust("--host", url, "--users", str(USERS), "--spawn-rate", str(USERS), "--only-summary",
                   "--max-tokens", str(TOKENS), "--metrics-csv", str(path), *options)  # fmt: skip
    with open(path, newline="", encoding="utf-8") as file:
        return done, {row["metric"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("profile", "user", "model"),
    [("chat", "CompletionsUser", "pairs"), ("burst", "ChatCompletionsUser", "")],
)
def test_figures_equal_what_was_emitted(server: str, tmp_path: Path, profile: str, user: str, model: str) -> None:
    seconds = "12s" if profile == "burst" else "4s"
    done, metrics = _run(server, tmp_path, "--profile", profile, "--model", model, "--run-time", seconds, user)
    assert done.returncode == 0, done.stderr
    streams = _get(f"{server}/streams")
    step = 2 if model == "pairs" else 1
    known = _emitted(streams, step)
    print({name: (round(value, 2), metrics[name]["value"]) for name, value in known.items()})
    for name, value in known.items():
        assert float(metrics[name]["value"]) == pytest.approx(value, rel=LOADTEST_RELATIVE), name

    tokens = sum(stream["tokens"] for stream in streams)
    assert {stream["path"] for stream in streams} == {CHAT if user == "ChatCompletionsUser" else COMPLETIONS}
    assert len(streams) >= 2 * USERS
    assert len({stream["prompt"][:16] for stream in streams}) == len(streams)
    assert int(metrics["requests"]["value"]) == len(streams)
    assert int(metrics["output_tokens"]["value"]) == tokens == TOKENS * len(streams)
    assert int(metrics["failures"]["value"]) == int(metrics["answers_without_usage"]["value"]) == 0
    assert int(metrics["ttft_p50"]["samples"]) == len(streams)
    assert int(metrics["tbt_p50"]["samples"]) == sum(len(stream["sent"]) - 1 for stream in streams) * step
    for kind in ("TTFT", "TBT"):
        assert re.search(rf"^{kind} +{CHAT if user == 'ChatCompletionsUser' else COMPLETIONS} ", done.stderr, re.M)
    if profile == "burst":
        _assert_bursts(sorted(stream["received"] for stream in streams))


def _emitted(streams: list[dict[str, Any]], step: int) -> dict[str, float]:
    """The figures by when requests began and tokens were sent; ``step`` tokens per chunk."""
    gaps = [
        (after - before) / step
        for stream in streams
        for before, after in zip(stream["sent"], stream["sent"][1:], strict=False)
    ]
    began = min(stream["asked"] for stream in streams)
    ended = max(stream["sent"][-1] for stream in streams)
    return {
        "output_tokens_per_second": sum(stream["tokens"] for stream in streams) / (ended - began),
        "ttft_p50": 1000 * statistics.median_low(stream["sent"][0] - stream["asked"] for stream in streams),
        "tbt_p50": 1000 * statistics.median(gaps),
    }


def _assert_bursts(received: list[float]) -> None:
    for first in range(0, len(received), USERS):
        burst = received[first : first + USERS]
        assert len(burst) == USERS
        assert burst[-1] - burst[0] < 0.1 * PROFILES["burst"].period_s
        assert burst[0] - received[0] == pytest.approx(first / USERS * PROFILES["burst"].period_s, abs=0.5)


def test_error_in_mid_stream_is_a_failure(server: str, tmp_path: Path) -> None:
    done, metrics = _run(server, tmp_path, "--model", "breaks", "--run-time", "2s")
    assert done.returncode == 1
    assert "engine died" in done.stderr
    assert {stream["path"] for stream in _get(f"{server}/streams")} == {CHAT, COMPLETIONS}
    assert metrics["failures"]["value"] == metrics["requests"]["value"] != "0"
    assert metrics["output_tokens"]["value"] == "0"
    assert metrics["output_tokens_per_second"]["value"] == metrics["ttft_p50"]["value"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "chaos"], "profile 'chaos' is not known; give --profile one of chat, long_prompt, burst"),
        (["--max-tokens", "-1"], "--max-tokens -1 is negative"),
        (["--host", "http://127.0.0.1:1"], "names no model at /v1/models"),
        ([], "check --host, or give --model"),
    ],
)
def test_wrong_options_end_the_run(options: list[str], message: str) -> None:
    done = _locust("--run-time", "5s", *options)
    assert done.returncode != 0
    assert message in done.stderr
