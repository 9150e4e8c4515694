# SPDX-License-Identifier: Apache-2.0
"""Proxy loss of the o_proj of one decoder layer against the scale of the codebook: how quantizer/encoders.py was set.

Usage: python scripts/sweep_scale.py MODEL CALIBRATION.txt
"""

import sys
from pathlib import Path

import torch

from quip_vllm.formats.methods import Code, Method
from quip_vllm.quantizer import group as groups
from quip_vllm.quantizer.calibration import calibration_tokens
from quip_vllm.quantizer.encoders import code_rms
from quip_vllm.quantizer.hessian import HessianCollector
from quip_vllm.quantizer.model import LayeredModel, run_layer
from quip_vllm.quantizer.settings import Settings

LAYER = 2
SWEEP = [
    (Method.QUIP_SHARP, None, 2, (0.8, 0.9, 1.0, 1.06, 1.12)),
    (Method.QUIP_SHARP, None, 3, (0.9, 0.98, 1.06)),
    (Method.QUIP_SHARP, None, 4, (0.75, 0.82, 0.9, 0.92, 0.96, 1.03)),
    (Method.QTIP, Code.ONE_MAD, 2, (0.9, 0.96, 1.02)),
    (Method.QTIP, Code.ONE_MAD, 4, (0.8, 0.85, 0.9, 0.97)),
    (Method.QTIP, Code.HYB, 1, (0.85, 0.9, 0.95)),
    (Method.QTIP, Code.HYB, 2, (0.85, 0.9, 0.95, 1.0, 1.05)),
    (Method.QTIP, Code.HYB, 3, (0.9, 0.95, 1.0, 1.05)),
    (Method.QTIP, Code.HYB, 4, (0.9, 0.95, 1.0, 1.05, 1.1)),
]


@torch.inference_mode()
def main(model: str, text: str) -> int:
    """Prints method, code, bits, scale and proxy loss."""
    settings = Settings(model, Method.QUIP_SHARP, 2, None, text, 16, 1024)
    source = LayeredModel(Path(model))
    hidden, kwargs = source.first_hidden_states(calibration_tokens(settings, model), 2)
    for index in range(LAYER + 1):
        layer = source.fill(index)
        collector = HessianCollector({"self_attn.o_proj": layer.get_submodule("self_attn.o_proj")})
        hidden = [run_layer(layer, x, kwargs[index]) for x in hidden]
        found = collector.close()
    weights = {"o_proj": source.layer_tensors(LAYER)["self_attn.o_proj.weight"]}
    for method, code, bits, scales in SWEEP:
        encoder = groups._encoder(method, code, bits)
        unit = 1.0 if code is None else code_rms(code, encoder.values)
        for scale in scales:
            encoder.rms = scale * unit
            changed = Settings(model, method, bits, code, text, 16, 1024)
            result = groups.quantize_group(found[0], weights, {"o_proj": bits}, changed)["o_proj"]
            print(method.value, code.value if code else "-", bits, scale, f"{result.proxy_loss:.6f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else print(__doc__) or 2)
