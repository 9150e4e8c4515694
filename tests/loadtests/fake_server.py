# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server that emits tokens at a known rate and remembers when it really did.

Run as ``python fake_server.py FD``, FD being an inherited listening socket. Tokens are due at fixed times after the
request came, so a late one does not delay the next; times are of ``time.perf_counter``, one clock for all processes.
A header ``X-Asked`` (``stamped_requests.py``) brings the time at which the client began the request.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

TTFT_S = 0.4
TBT_S = 0.05
KEEP_ALIVE_S = 0.02  # also keeps the caches of both processes warm: one that slept for a second wakes slowly
MODELS = ("steady", "pairs", "breaks")  # one token a chunk; two tokens a chunk; an error event after three tokens

app = FastAPI()
streams: list[dict[str, Any]] = []


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    """Lists the three behaviours as models."""
    return {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]}


@app.get("/streams")
async def recorded() -> list[dict[str, Any]]:
    """What was really sent: one record a request."""
    return streams


@app.post("/v1/chat/completions")
@app.post("/v1/completions")
async def generate(request: Request) -> StreamingResponse:
    """Streams ``max_tokens`` tokens, the first TTFT_S after the request and then one each TBT_S."""
    received = time.perf_counter()
    asked = float(request.headers.get("X-Asked", received))
    body = await request.json()
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    record = {"path": request.url.path, "asked": asked, "received": received, "prompt": prompt, "tokens": 0, "sent": []}
    streams.append(record)
    return StreamingResponse(_emit(body, record), media_type="text/event-stream")


async def _emit(body: dict[str, Any], record: dict[str, Any]) -> AsyncIterator[str]:
    step = 2 if body["model"] == "pairs" else 1
    chat = "messages" in body
    if chat:
        yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for token in range(0, body["max_tokens"], step):
        if body["model"] == "breaks" and token == 3:
            yield _event({"error": {"message": "engine died", "code": 500}})
            break
        due = record["received"] + TTFT_S + token * TBT_S
        while (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(min(wait, KEEP_ALIVE_S))
            yield ": keep-alive\n\n"
        record["sent"].append(time.perf_counter())
        record["tokens"] += step
        text = "word " * step
        finish = "length" if token + step >= body["max_tokens"] else None
        yield _event({"choices": [{"index": 0, "finish_reason": finish, **({"delta": {"content": text}} if chat
                                                                           else {"text": text})}]})  # fmt: skip
    else:
        yield _event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": record["tokens"]}})
    yield "data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload)}\n\n"


if __name__ == "__main__":
    # uvicorn's own ``fd`` takes the socket for a Unix one: Nagle's algorithm stays on and holds chunks back.
    listener = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])
