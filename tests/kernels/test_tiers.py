# SPDX-License-Identifier: Apache-2.0
"""Every instruction-set tier that this CPU runs passes the op tests; a tier it does not run is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numerics import SEARCH_DISTORTION
from tiers import TIERS, runs_here

ROOT = Path(__file__).resolve().parents[2]


def run(tier, *arguments):
    environment = {**os.environ, "QUIP_VLLM_CPU_TIER": tier}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("tier", TIERS)
def test_linear_at_every_tier(tier):
    if not runs_here(tier):
        pytest.skip(f"this CPU does not run {tier}")
    chosen = "test_linear_is_the_dequantized_weight or rows_and_products or nearest or decodable or test_integers"
    files = [str(path) for path in ROOT.glob("tests/ops/test_cpu*.py")]
    result = run(tier, "-m", "pytest", "-q", "-x", *files, "-k", chosen)
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_searches_of_all_tiers_are_as_good():
    """16-bit costs (avx512) lose nothing that shows: the distortion equals the float search's to 0.2 %."""
    program = (
        "import torch; from quip_vllm.ops import encode_trellis; from quip_vllm.formats.spec import FORMATS; "
        "t = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)); v = FORMATS['1mad'].values(); "
        "print([float((v[encode_trellis(t, v, b).long()].flatten(1) - t).square().mean()) for b in (2, 4)])"
    )
    tiers = [tier for tier in TIERS if runs_here(tier)]
    results = {tier: eval(run(tier, "-c", program).stdout) for tier in tiers}
    for tier in tiers:
        assert results[tier] == pytest.approx(results["portable"], rel=SEARCH_DISTORTION), results


def test_an_unknown_tier_is_refused():
    result = run("avx1024", "-c", "from quip_vllm import ops; print(ops.cpu_tier())")
    assert result.returncode != 0
    assert "avx1024" in result.stderr and "portable" in result.stderr
