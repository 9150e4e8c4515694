# SPDX-License-Identifier: Apache-2.0
"""What the sanitizers' tests have compiled."""

import json
from pathlib import Path

from compiled import ROOT, compiled
from tiers import TIERS, runs_here

PRESETS = json.loads((ROOT / "kernels" / "CMakePresets.json").read_text())["configurePresets"]
INSTEAD = {  # sanitizer -> what stands in its build for a tier, by the tier
    one["name"]: dict(pair.split("=") for pair in one["cacheVariables"]["QUIP_INSTEAD"].split(";"))
    for one in PRESETS
    if one["name"] in ("address", "thread")
}


def sanitized(sanitizer: str) -> Path:
    """compiled() of a sanitizer's preset, without the tiers that this CPU does not run: portable stands for them."""
    others = {tier: "portable" for tier in TIERS if not runs_here(tier)}
    pairs = (others | INSTEAD[sanitizer]).items()
    return compiled(sanitizer, variables=("QUIP_INSTEAD=" + ";".join(f"{tier}={other}" for tier, other in pairs),))
