# SPDX-License-Identifier: Apache-2.0
"""Locust users that stream from an OpenAI-compatible server; see README.md for how to run and what is reported."""

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import gevent
import requests
from locust import HttpUser, events, stats, task
from locust.env import Environment
from locust.runners import LocalRunner
from urllib3.exceptions import HTTPError

from loadtests.metrics import Recorder
from loadtests.profiles import Profile, chat_messages, completion_prompt, get_profile, seconds_to_burst
from loadtests.streaming import StreamError, measure_stream

STALL_TIMEOUT_S = 300
READ_BYTES = 1 << 16


class Run:
    """What the users of one run share: created at ``init``, completed at ``test_start``."""

    profile: Profile
    recorder: Recorder
    model: str
    began: float
    numbers: Iterator[int]


run = Run()

# locust keeps two significant digits, 6 % apart at worst; its tables should agree with ours.
stats.bucket_response_time = lambda milliseconds: float(f"{milliseconds:.3g}")


@events.init_command_line_parser.add_listener
def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(profile="chat", stop_timeout="120")  # locust's own options: let answers under way finish
    group = parser.add_argument_group("Load test", "--profile is one of chat (default), long_prompt, burst")
    group.add_argument("--model", default="", help="Model to ask for (default: the first of /v1/models)")
    group.add_argument("--max-tokens", type=int, default=0, help="Output tokens per request (default: the profile's)")
    group.add_argument("--seed", type=int, default=0, help="Same seed, same prompts (default: 0)")
    group.add_argument("--metrics-csv", default="", help="File for the figures (default: only print them)")


@events.init.add_listener
def _check_options(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    try:
        run.profile = get_profile(options.profile)
        if options.max_tokens < 0:
            raise ValueError(f"--max-tokens {options.max_tokens} is negative; give a count, or 0 for the profile's")
        if not isinstance(environment.runner, LocalRunner):
            raise ValueError(
                "workers of a distributed run would repeat each other's prompts; run one locust process, "
                "without --master, --worker and --processes"
            )
    except ValueError as error:
        raise SystemExit(str(error)) from error  # locust logs other exceptions and goes on


@events.test_start.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    run.recorder = Recorder(run.profile.name)
    run.model = environment.parsed_options.model or _first_model(environment.host)
    run.began = time.perf_counter()
    run.numbers = itertools.count()


@events.test_stop.add_listener
def _report(environment: Environment, **_: Any) -> None:
    print(run.recorder.table(), flush=True)
    if environment.parsed_options.metrics_csv:
        run.recorder.write_csv(environment.parsed_options.metrics_csv)


def _first_model(host: str | None) -> str:
    try:
        response = requests.get(f"{host}/v1/models", timeout=STALL_TIMEOUT_S)
        response.raise_for_status()
        return response.json()["data"][0]["id"]
    except (requests.RequestException, LookupError, TypeError) as error:
        raise SystemExit(
            f"host {host!r} names no model at /v1/models ({error!r}); check --host, or give --model"
        ) from error


class StreamingUser(HttpUser):
    """Sends one streamed request after another (or one a burst) and measures each answer."""

    abstract = True
    path = ""

    def prompt(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The part of the request body that carries the prompt."""
        raise NotImplementedError

    def on_start(self) -> None:
        """Takes a user number; in a burst profile, idles until the first burst."""
        self.number = next(run.numbers)
        self.sent = 0
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Seconds to the next request; in a burst profile all users wait for the same moment."""
        return seconds_to_burst(run.profile, time.perf_counter() - run.began)

    @task
    def stream(self) -> None:
        """Sends one request and reads its answer to the end."""
        options = self.environment.parsed_options
        messages = chat_messages(run.profile, options.seed, self.number, self.sent)
        self.sent += 1
        body = {
            "model": run.model, **self.prompt(messages), "max_tokens": options.max_tokens or run.profile.max_tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        started = time.perf_counter()
        run.recorder.start(started)
        with self.client.post(
            self.path, json=body, headers={"Accept-Encoding": "identity"}, stream=True, catch_response=True,
            timeout=STALL_TIMEOUT_S,
        ) as response:  # fmt: skip
            try:
                measured = measure_stream(_arrivals(response))
            except (StreamError, requests.RequestException, HTTPError, OSError) as error:
                run.recorder.failure()
                response.failure(error)
                response.close()
                return
            response.request_meta["response_time"] = (time.perf_counter() - started) * 1000
        run.recorder.success(started, measured)
        if measured.first_token_at is not None:
            self._fire("TTFT", measured.first_token_at - started)
        for gap in measured.token_gaps:
            self._fire("TBT", gap)

    def _fire(self, kind: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=self.path,
            response_time=seconds * 1000,
            response_length=0,
            exception=None,
            context={},
        )


def _arrivals(response: Any) -> Iterator[tuple[float, bytes]]:
    if response.error:
        raise response.error
    if response.status_code != 200:
        raise StreamError(f"HTTP status {response.status_code}: {response.text[:200]}")
    while block := response.raw.read1(READ_BYTES):
        yield time.perf_counter(), block


class ChatCompletionsUser(StreamingUser):
    """Streams from /v1/chat/completions."""

    path = "/v1/chat/completions"

    def prompt(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The messages themselves."""
        return {"messages": messages}


class CompletionsUser(StreamingUser):
    """Streams from /v1/completions."""

    path = "/v1/completions"

    def prompt(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The messages as one text."""
        return {"prompt": completion_prompt(messages)}
