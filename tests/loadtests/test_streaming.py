# SPDX-License-Identifier: Apache-2.0
"""The stream parser, on streams written out by hand."""

import json
from typing import Any

import pytest

from loadtests.metrics import MetricRow, Recorder, percentile
from loadtests.streaming import SseDecoder, StreamError, StreamMeasurement, measure_stream

DONE = b"data: [DONE]\n\n"


def event(text: str | None = None, finish: str | None = None, usage: int | None = None) -> bytes:
    payload: dict[str, Any] = {"choices": [] if text is None else [{"text": text, "finish_reason": finish}]}
    if usage is not None:
        payload["usage"] = {"completion_tokens": usage}
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def measure(*blocks: tuple[float, bytes]) -> StreamMeasurement:
    return measure_stream(iter(blocks))


def test_one_token_a_chunk() -> None:
    seen = measure((1.0, event("a")), (1.5, event("b")), (2.25, event("c", "length")), (2.3, event(usage=3) + DONE))
    assert seen == StreamMeasurement(3, True, 1.0, 2.25, (0.5, 0.75))


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_bytes_cut_anywhere(size: int) -> None:
    stream = (b": keep-alive\r\n\r\n" + event("né").replace(b"\n", b"\r\n") + b"event: x\nid: 1\n" + event("b", "stop")
              + event(usage=2) + DONE)  # fmt: skip
    seen = measure(*((float(i), stream[i : i + size]) for i in range(0, len(stream), size)))
    assert (seen.tokens, seen.usage_reported, len(seen.token_gaps)) == (2, True, 1)
    assert seen.first_token_at < seen.last_token_at or size == 50


def test_decoder_joins_lines_and_drops_comments() -> None:
    decoder = SseDecoder()
    assert list(decoder.feed(b": ping\n\ndata: a\ndata:b\n")) == []
    assert list(decoder.feed(b"\ndata: c\n\n\n")) == ["a\nb", "c"]


def test_role_chunk_and_reasoning_text() -> None:
    def chat(**delta: str | None) -> bytes:
        return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"

    seen = measure((0.0, chat(role="assistant", content="")), (1.0, chat(reasoning_content="hm")),
                   (3.0, chat(content="yes")), (3.0, DONE))  # fmt: skip
    assert seen == StreamMeasurement(2, False, 1.0, 3.0, (2.0,))


def test_without_usage_chunks_are_counted() -> None:
    assert measure((1.0, event("a")), (2.0, event("b", "stop")), (2.0, DONE)) == StreamMeasurement(
        2, False, 1.0, 2.0, (1.0,)
    )


def test_several_tokens_in_one_event_share_its_gap() -> None:
    seen = measure((0.0, event("a b")), (4.0, event("c d", "length")), (4.1, event(usage=4) + DONE))
    assert seen == StreamMeasurement(4, True, 0.0, 4.0, (2.0, 2.0))


def test_running_usage_gives_the_exact_share() -> None:
    seen = measure((0.0, event("a", usage=1)), (3.0, event("b c d", usage=4)), (3.5, event("'", usage=4)),
                   (4.0, event("e", "length", usage=5)), (4.0, event(usage=5) + DONE))  # fmt: skip
    assert seen == StreamMeasurement(5, True, 0.0, 4.0, (1.0, 1.0, 1.0, 1.0))


def test_several_events_in_one_block_arrive_together() -> None:
    seen = measure((0.0, event("a")), (2.0, event("b") + event("c", "length") + event(usage=3) + DONE))
    assert seen.token_gaps == (2.0, 0.0)


def test_end_of_sequence_token_has_no_text() -> None:
    seen = measure((0.0, event("a")), (1.0, event("b")), (2.0, event("", "stop")), (2.1, event(usage=3) + DONE))
    assert seen == StreamMeasurement(3, True, 0.0, 2.0, (1.0, 1.0))
    uncounted = measure((0.0, event("a")), (1.0, event("b")), (1.1, event("", "stop")), (1.2, event(usage=2) + DONE))
    assert uncounted == StreamMeasurement(2, True, 0.0, 1.0, (1.0,))


def test_tokens_without_text_are_tokens_where_usage_says_so() -> None:
    stream = ((0.0, event("")), (1.0, event("a")), (2.0, event("")), (3.0, event("é", "length")))
    assert measure(*stream, (3.0, event(usage=4) + DONE)) == StreamMeasurement(4, True, 0.0, 3.0, (1.0, 1.0, 1.0))
    assert measure(*stream, (3.0, DONE)) == StreamMeasurement(2, False, 1.0, 3.0, (2.0,))


def test_more_chunks_than_tokens() -> None:
    seen = measure((0.0, event("a")), (1.0, event("b")), (2.0, event("c", "stop")), (2.0, event(usage=2) + DONE))
    assert seen == StreamMeasurement(2, True, 0.0, 2.0, (1.5, 1.5))


def test_answer_without_tokens() -> None:
    assert measure((0.0, event("", "stop") + event(usage=0) + DONE)) == StreamMeasurement(0, True, None, None, ())


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b'data: {"error": {"message": "out of memory"}}\n\n' + DONE, "out of memory"),
        (b'data: {"object": "error", "message": "too long"}\n\n' + DONE, "too long"),
        (b"data: {broken\n\n" + DONE, "is not JSON"),
        (b"data: [1]\n\n" + DONE, "error in mid-stream"),
        (b"", "ended before"),
        (event("b"), "ended before"),
    ],
)
def test_broken_streams(stream: bytes, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        measure((0.0, event("a")), (1.0, stream))


def test_percentile_is_nearest_rank() -> None:
    assert percentile([], 50) is None
    assert [percentile([4.0, 1.0, 3.0, 2.0], p) for p in (50, 95, 99)] == [2.0, 4.0, 4.0]


def test_recorder_counts_whole_answers_only(tmp_path: Any) -> None:
    recorder = Recorder("chat")
    for started in (10.0, 10.5, 11.0):
        recorder.start(started)
    recorder.success(10.0, StreamMeasurement(3, True, 10.25, 12.25, (1.0, 1.0)))
    recorder.success(10.5, StreamMeasurement(2, False, 11.0, 12.5, (1.5,)))
    recorder.failure()
    rows = {row.metric: row for row in recorder.rows()}
    assert rows["output_tokens_per_second"] == MetricRow("chat", "output_tokens_per_second", 2.0, "tokens/s", 2)
    assert rows["ttft_p50"] == MetricRow("chat", "ttft_p50", 250.0, "ms", 2)
    assert rows["tbt_p99"] == MetricRow("chat", "tbt_p99", 1500.0, "ms", 3)
    assert [rows[name].value for name in ("requests", "failures", "answers_without_usage")] == [3, 1, 1]
    recorder.write_csv(tmp_path / "m.csv")
    lines = (tmp_path / "m.csv").read_text().splitlines()
    assert lines[0] == "profile,metric,value,unit,samples"
    assert [line.split(",")[1] for line in lines[1:]] == list(rows)
    assert len(recorder.table().splitlines()) == len(lines)
