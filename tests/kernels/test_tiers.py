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


def run(tier, *arguments, **more):
    environment = {**os.environ, "QUIP_VLLM_CPU_TIER": tier, **more}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("tier", TIERS)
def test_linear_at_every_tier(tier):
    if not runs_here(tier):
        pytest.skip(f"this CPU does not run {tier}")
    chosen = "test_linear_is_the_dequantized_weight or rows_and_products or nearest or decodable or test_integers"
    files = [str(path) for path in ROOT.glob("tests/ops/test_cpu*.py")]
    result = run(tier, "-m", "pytest", "-q", "-x", *files, "-k", chosen, "-m", "not exhaustive")
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


def test_integer_products_of_all_tiers_are_the_same_bits():
    """A layer of mixed tiers (kernels/cpu/fastest.h) is then the layer of any: no choice moves a result.

    The rotation is in blocks of 16, whose sums every tier adds in one order, so whole layers agree.
    """
    program = (
        "import torch; from random_layers import random_layer; from quip_vllm.ops import LinearSpec, cpu_tier; "
        "from quip_vllm.ops.cpu import CpuBackend, fastest_tiers; import hashlib\n"
        "for code, bits in (('hyb', 2), ('1mad', 2), ('3inst', 3), ('mul1', 4), ('lut', 2), ('grid', 5)):\n"
        "    spec = LinearSpec(code, bits, 272, (48, 16), 16)\n"
        "    layer = CpuBackend().prepare(spec, random_layer(spec))\n"
        "    for rows in (1, 3, 20, 130):\n"
        "        x = torch.randn(rows, 272, generator=torch.Generator().manual_seed(rows)).bfloat16()\n"
        "        print(code, rows, hashlib.sha256(layer.linear(x).view(torch.int16).numpy().tobytes()).hexdigest())\n"
        "    names = fastest_tiers(layer).split(', '); print('tiers', names, file=__import__('sys').stderr)\n"
        "    assert len(names) == 3\n"
    )
    tiers = [tier for tier in TIERS if runs_here(tier) and tier != "portable"]
    results = {tier: run(tier, "-c", program, PYTHONPATH="tests").stdout for tier in (*tiers, "")}
    assert results[""].count("\n") == 24 and set(results.values()) == {results[""]}


def test_an_unknown_tier_is_refused():
    result = run("avx1024", "-c", "from quip_vllm import ops; print(ops.cpu_tier())")
    assert result.returncode != 0
    assert "avx1024" in result.stderr and "portable" in result.stderr
