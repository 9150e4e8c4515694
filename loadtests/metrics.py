# SPDX-License-Identifier: Apache-2.0
"""Gathers the measurements of a run into the reported figures and their CSV file."""

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from loadtests.streaming import StreamMeasurement

PERCENTILES = (50, 95, 99)


class MetricRow(NamedTuple):
    """One row of the CSV file; the field names are its header. README.md defines each metric."""

    profile: str
    metric: str
    value: float | int | None
    unit: str
    samples: int


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest-rank percentile: the smallest value with at least ``percent`` % of all values at or below it."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


class Recorder:
    """Collects what a run's requests showed. Only whole answers count towards tokens and times."""

    def __init__(self, profile: str) -> None:
        self._profile = profile
        self._requests = self._failures = self._without_usage = self._tokens = 0
        self._began, self._ended = math.inf, -math.inf
        self._ttft_ms = array("d")
        self._tbt_ms = array("d")

    def start(self, now: float) -> None:
        """Counts a request sent at ``now`` (seconds, any clock, the same for all calls)."""
        self._began = min(self._began, now)

    def success(self, started: float, measured: StreamMeasurement) -> None:
        """Adds a whole answer to a request sent at ``started``."""
        self._requests += 1
        self._tokens += measured.tokens
        self._without_usage += not measured.usage_reported
        if measured.first_token_at is not None and measured.last_token_at is not None:
            self._ended = max(self._ended, measured.last_token_at)
            self._ttft_ms.append((measured.first_token_at - started) * 1000)
        self._tbt_ms.extend(gap * 1000 for gap in measured.token_gaps)

    def failure(self) -> None:
        """Adds a request that brought no whole answer."""
        self._requests += 1
        self._failures += 1

    def rows(self) -> Iterator[MetricRow]:
        """Yields one row a metric, always the same metrics in the same order."""
        seconds = max(0.0, self._ended - self._began)
        answers = self._requests - self._failures
        for metric, value, unit, samples in (
            ("requests", self._requests, "requests", self._requests),
            ("failures", self._failures, "requests", self._requests),
            ("answers_without_usage", self._without_usage, "requests", answers),
            ("output_tokens", self._tokens, "tokens", answers),
            ("duration", seconds, "s", answers),
            ("output_tokens_per_second", self._tokens / seconds if seconds else None, "tokens/s", answers),
        ):
            yield MetricRow(self._profile, metric, value, unit, samples)
        for name, values in (("ttft", self._ttft_ms), ("tbt", self._tbt_ms)):
            for percent in PERCENTILES:
                value = percentile(values, percent)
                yield MetricRow(self._profile, f"{name}_p{percent}", value, "ms", len(values))

    def table(self) -> str:
        """The rows as text, one a line."""
        lines = [f"{'metric':<26}{'value':>12} {'unit':<10}{'samples':>9}"]
        for row in self.rows():
            value = "-" if row.value is None else f"{row.value:.2f}".removesuffix(".00")
            lines.append(f"{row.metric:<26}{value:>12} {row.unit:<10}{row.samples:>9}")
        return "\n".join(lines)

    def write_csv(self, path: str | Path) -> None:
        """Writes the rows; a metric without a sample has an empty value."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(MetricRow._fields)
            writer.writerows(self.rows())
