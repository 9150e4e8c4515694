# SPDX-License-Identifier: Apache-2.0
"""What the sanitizers' tests have compiled."""

import json

import pytest
from compiled import ROOT, compiled
from tiers import TIERS, runs_here

PRESETS = json.loads((ROOT / "kernels" / "CMakePresets.json").read_text())["configurePresets"]
INSTEAD = {  # sanitizer -> what stands in its build for a tier, by the tier
    one["name"]: dict(pair.split("=") for pair in one["cacheVariables"]["QUIP_INSTEAD"].split(";"))
    for one in PRESETS
    if one["name"] in ("address", "thread")
}


def sanitized(config: pytest.Config) -> None:
    """Compiles both presets, or skips the test without --sanitize.

    Tiers that this CPU does not run are left out: portable stands for them.
    """
    if not config.getoption("--sanitize"):
        pytest.skip("builds and runs for minutes: make sanitize")
    others = {tier: "portable" for tier in TIERS if not runs_here(tier)}
    for sanitizer, instead in INSTEAD.items():
        pairs = ";".join(f"{tier}={other}" for tier, other in (others | instead).items())
        compiled(sanitizer, variables=(f"QUIP_INSTEAD={pairs}",))
