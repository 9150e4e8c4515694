# SPDX-License-Identifier: Apache-2.0
"""Every environment variable the project reads."""

import os


def backend() -> str | None:
    """QUIP_VLLM_BACKEND: run this backend and no other (cpu, reference); unset: the first that can."""
    return os.environ.get("QUIP_VLLM_BACKEND") or None


def cpu_tier() -> str | None:
    """QUIP_VLLM_CPU_TIER: lower the instruction-set tier (portable, avx2, avx512); unset: the best the CPU has."""
    return os.environ.get("QUIP_VLLM_CPU_TIER") or None
