# SPDX-License-Identifier: Apache-2.0
"""The instruction-set tiers of the CPU kernels, and which of them this CPU runs."""

import os
import subprocess
import sys
from functools import cache

TIERS = ("portable", "avx2", "avx512", "avx512_vnni", "amx", "amx_emulated")


@cache
def runs_here(tier):
    program = "from quip_vllm import ops; print(ops.cpu_tier())"
    environment = {**os.environ, "QUIP_VLLM_CPU_TIER": tier}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return result.stdout.strip() == tier
