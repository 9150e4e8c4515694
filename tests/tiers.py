# SPDX-License-Identifier: Apache-2.0
"""The instruction-set tiers of the CPU kernels, and which of them this CPU runs."""

from quip_vllm.ops import cpu_tiers

TIERS = tuple(cpu_tiers())


def runs_here(tier):
    return all(cpu_tiers()[tier].values())
