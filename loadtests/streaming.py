# SPDX-License-Identifier: Apache-2.0
"""Measures one streamed answer of an OpenAI-compatible server. Knows neither locust nor HTTP: bytes and times go in."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

TEXT_KEYS = ("text", "content", "reasoning_content", "reasoning", "tool_calls")


class StreamError(Exception):
    """The stream did not bring a whole answer: an error event, unreadable data, or an early end."""


@dataclass(frozen=True)
class StreamMeasurement:
    """What one whole stream showed; times on the clock of the arrivals, in seconds.

    Attributes:
        tokens: Output tokens: ``usage.completion_tokens``, or the number of chunks with text where there was no usage.
        usage_reported: Whether the server sent usage.
        first_token_at: Arrival of the first chunk that brings tokens; None where no token came.
        last_token_at: Arrival of the last one; None where no token came.
        token_gaps: Time between tokens, one sample a token after the first chunk (see ``_token_gaps``).
    """

    tokens: int
    usage_reported: bool
    first_token_at: float | None
    last_token_at: float | None
    token_gaps: tuple[float, ...]


class SseDecoder:
    """Turns bytes, cut anywhere, into the data of server-sent events; comments (keep-alives) are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, block: bytes) -> Iterator[str]:
        """Yields the data of each event that ``block`` completes."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
            elif not line.strip() and self._data:
                yield "\n".join(self._data)
                self._data = []


@dataclass(frozen=True)
class _Chunk:
    arrived: float
    has_text: bool
    running_tokens: int | None  # completion tokens up to and with this chunk, where each chunk carries usage


def measure_stream(arrivals: Iterable[tuple[float, bytes]]) -> StreamMeasurement:
    """Reads a stream to its end.

    Args:
        arrivals: (time in seconds, bytes) of each block as it came.

    Raises:
        StreamError: The stream held an error or unreadable data, or ended before ``[DONE]`` and any finish_reason.
    """
    decoder = SseDecoder()
    chunks: list[_Chunk] = []
    usage_tokens: int | None = None
    finished = False
    for arrived, block in arrivals:
        for data in decoder.feed(block):
            if data == "[DONE]":
                finished = True
                continue
            event = _parse(data)
            running = (event.get("usage") or {}).get("completion_tokens")
            usage_tokens = usage_tokens if running is None else running
            for choice in event.get("choices") or ():
                finished = finished or choice.get("finish_reason") is not None
                message = choice.get("delta") or choice
                has_text = any(message.get(key) for key in TEXT_KEYS)
                if has_text or "role" not in message:
                    chunks.append(_Chunk(arrived, has_text, running))
    if not finished:
        raise StreamError("the stream ended before [DONE] or a finish_reason; look for the cause in the server's log")
    chunks = _token_chunks(chunks, usage_tokens)
    tokens = len(chunks) if usage_tokens is None else usage_tokens
    return StreamMeasurement(
        tokens=tokens,
        usage_reported=usage_tokens is not None,
        first_token_at=chunks[0].arrived if chunks else None,
        last_token_at=chunks[-1].arrived if chunks else None,
        token_gaps=tuple(_token_gaps(chunks, tokens)),
    )


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise StreamError(f"event {data[:80]!r} is not JSON") from error
    if not isinstance(event, dict) or event.get("error") or event.get("object") == "error":
        raise StreamError(f"the server sent an error in mid-stream: {data[:200]}")
    return event


def _token_chunks(chunks: list[_Chunk], usage_tokens: int | None) -> list[_Chunk]:
    """Picks the chunks that bring tokens.

    Where every chunk carries usage: those at which it grew. Else all chunks, if usage says that there are as many
    tokens (a token may be without text: end of sequence, part of a character). Else those with text.
    """
    if all(chunk.running_tokens is not None for chunk in chunks):
        counts = [0, *(chunk.running_tokens for chunk in chunks)]
        return [chunk for chunk, before in zip(chunks, counts, strict=False) if chunk.running_tokens > before]
    return chunks if len(chunks) == usage_tokens else [chunk for chunk in chunks if chunk.has_text]


def _token_gaps(chunks: list[_Chunk], tokens: int) -> Iterator[float]:
    """Yields the time between tokens.

    A chunk that arrives ``g`` seconds after the one before and carries ``n`` tokens gives ``n`` samples of ``g / n``.
    ``n`` is the growth of usage where every chunk carries it; else ``tokens / len(chunks)``, the same for all chunks
    of the stream (1 where each chunk is a token), with one sample a chunk where that is below 1.
    """
    exact = all(chunk.running_tokens is not None for chunk in chunks)
    for before, chunk in zip(chunks, chunks[1:], strict=False):
        carried = chunk.running_tokens - before.running_tokens if exact else tokens / len(chunks)
        yield from [(chunk.arrived - before.arrived) / carried] * max(1, round(carried))
