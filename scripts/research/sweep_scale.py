# SPDX-License-Identifier: Apache-2.0
"""Proxy loss of the o_proj of one decoder layer against the scale of the codebook: how rounding/encoders.py was set.

The scale of the grid is where its last level is, in root mean squares of the weight (GRID_ENDS). With CODE grid, the
loss of each rounding follows.

Usage: python scripts/research/sweep_scale.py MODEL CALIBRATION.txt [CODE]
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import torch

from quip_vllm.formats.spec import LinearSpec, format_of
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.layer import quantize_group
from quip_vllm.quantizer.rounding.encoders import code_rms, make_encoder
from quip_vllm.quantizer.settings import GREEDY, LDLQ, NEAREST, Settings
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer

LAYER = 2
SWEEP = [
    ("e8p", 2, (0.8, 0.9, 1.0, 1.06, 1.12)),
    ("e8p", 3, (0.9, 0.98, 1.06)),
    ("e8p", 4, (0.75, 0.82, 0.9, 0.92, 0.96, 1.03)),
    ("1mad", 2, (0.9, 0.96, 1.02)),
    ("1mad", 4, (0.8, 0.85, 0.9, 0.97)),
    ("hyb", 1, (0.85, 0.9, 0.95)),
    ("hyb", 2, (0.85, 0.9, 0.95, 1.0, 1.05)),
    ("hyb", 3, (0.9, 0.95, 1.0, 1.05)),
    ("hyb", 4, (0.9, 0.95, 1.0, 1.05, 1.1)),
    ("grid", 2, (1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.4)),
    ("grid", 3, (1.9, 2.05, 2.2, 2.35, 2.5)),
    ("grid", 4, (2.2, 2.4, 2.6, 2.8, 3.0)),
    ("grid", 5, (2.6, 2.8, 3.0, 3.2, 3.5)),
    ("grid", 6, (3.0, 3.3, 3.6, 3.9)),
    ("grid", 7, (3.3, 3.6, 3.9, 4.2)),
    ("grid", 8, (3.6, 3.9, 4.2, 4.5, 4.8)),
]


@torch.no_grad()
def main(model: str, text: str, only: str | None = None) -> int:
    """Prints code, bits, scale and proxy loss, of one code if that is named."""
    settings = Settings(model, "e8p", 2, text, 16, 1024, tune="none")
    source = LayeredModel(Path(model))
    name = f"{source.prefix}.{LAYER}.self_attn.o_proj"
    vocabulary = source.config.vocab_size
    hidden, calls = source.first_hidden_states(calibration_tokens(settings, Path(model), vocabulary), 2)
    for index in range(LAYER + 1):
        with source.layer(index) as layer:
            linears = source.linears(index)
            collector = Collector({name: linears[name]} if name in linears else {})
            hidden = [run_layer(layer, x, calls[index]) for x in hidden]
            groups = collector.close()
    weight = source.reader.read([f"{name}.weight"])[f"{name}.weight"]
    for code, bits, scales in SWEEP:
        if only not in (None, code):
            continue
        encoder, format = make_encoder(code, bits), format_of(code)
        unit = 1.0 if code in ("e8p", "grid") else code_rms(format, encoder.values)
        spec = LinearSpec(code, bits, weight.shape[1], (weight.shape[0],))
        for scale in scales:
            encoder.rms = encoder.last / scale if code == "grid" else scale * unit
            entry = quantize_group(groups[0], {name: weight}, {name: spec}, settings)[name].entry
            print(code, bits, scale, f"{entry['proxy_loss']:.6f}", flush=True)
    make_encoder.cache_clear()  # with the scales that the quantizer has
    for bits, rounding in itertools.product((3, 4), (NEAREST, LDLQ, GREEDY) if only == "grid" else ()):
        chosen = dataclasses.replace(settings, code="grid", rounding=rounding, two_sided=False)
        spec = LinearSpec("grid", bits, weight.shape[1], (weight.shape[0],))
        entry = quantize_group(groups[0], {name: weight}, {name: spec}, chosen)[name].entry
        print("grid", bits, rounding, f"{entry['proxy_loss']:.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) in (3, 4) else print(__doc__) or 2)
