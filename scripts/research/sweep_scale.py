# SPDX-License-Identifier: Apache-2.0
"""Proxy loss of the o_proj of one decoder layer against the scale of the codebook: how quantizer/encoders.py was set.

Usage: python scripts/research/sweep_scale.py MODEL CALIBRATION.txt
"""

import sys
from pathlib import Path

import torch

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.formats.trellis_codes import TrellisCode
from quip_vllm.quantizer import group as groups
from quip_vllm.quantizer.calibration import calibration_tokens
from quip_vllm.quantizer.encoders import code_rms
from quip_vllm.quantizer.hessian import HessianCollector
from quip_vllm.quantizer.model import LayeredModel, run_layer
from quip_vllm.quantizer.settings import Settings

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
]


@torch.inference_mode()
def main(model: str, text: str) -> int:
    """Prints code, bits, scale and proxy loss."""
    settings = Settings(model, "e8p", 2, text, 16, 1024)
    source = LayeredModel(Path(model))
    hidden, kwargs = source.first_hidden_states(calibration_tokens(settings, model), 2)
    for index in range(LAYER + 1):
        layer = source.fill(index)
        collector = HessianCollector({"self_attn.o_proj": layer.get_submodule("self_attn.o_proj")})
        hidden = [run_layer(layer, x, kwargs[index]) for x in hidden]
        found = collector.close()
    weights = {"o_proj": source.layer_tensors(LAYER)["self_attn.o_proj.weight"]}
    for code, bits, scales in SWEEP:
        encoder, format = groups._encoder(code, bits), LayerFormat(code, bits).format
        unit = code_rms(format, encoder.values) if isinstance(format, TrellisCode) else 1.0
        for scale in scales:
            encoder.rms = scale * unit
            changed = Settings(model, code, bits, text, 16, 1024)
            result = groups.quantize_group(found[0], weights, {"o_proj": bits}, changed)["o_proj"]
            print(code, bits, scale, f"{result.proxy_loss:.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else print(__doc__) or 2)
