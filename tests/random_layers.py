# SPDX-License-Identifier: Apache-2.0
"""Random quantized layers, for every format."""

import torch

from quip_vllm.formats.methods import Code, Method, supported_bits
from quip_vllm.formats.trellis_codes import default_lut
from quip_vllm.ops import LinearSpec

FORMATS = [(Method.QUIP_SHARP, None, bits) for bits in supported_bits(Method.QUIP_SHARP)]
FORMATS += [(Method.QTIP, code, bits) for code in Code for bits in supported_bits(Method.QTIP, code)]
FORMAT_IDS = [f"{method.value}-{code.value if code else 'e8p'}-{bits}" for method, code, bits in FORMATS]


def every_lattice_code(bits: int) -> tuple[LinearSpec, dict[str, torch.Tensor]]:
    """A layer of quip_sharp with each of the 65,536 codes once, in the second stage, too."""
    spec = LinearSpec(Method.QUIP_SHARP, None, bits, 8192, (64,))
    order = torch.stack([torch.randperm(65536, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    first, second = order.view(2, 64, 1024)
    tensors = random_layer(spec) | {"codes": first.to(torch.int16)}
    if bits > 2:
        tensors["residual_codes"] = second.to(torch.uint8 if bits == 3 else torch.int16)
    return spec, tensors


def random_layer(spec: LinearSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint's layer with random codes and magnitudes in su and sv."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, shape, dtype):
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    n, k = spec.out_features, spec.in_features
    tensors = {
        "su": torch.randn(k, generator=generator).half(),
        "sv": torch.randn(n, generator=generator).half(),
    }
    if spec.method is Method.QTIP:
        tensors["packed"] = integers(-32768, 32768, (-(-n // 16), k * spec.bits), torch.int16)
        if spec.code is Code.HYB:
            lut = default_lut(Code.HYB).float()
            noise = torch.randn(len(spec.output_sizes), *lut.shape, generator=generator)
            tensors["lut"] = (lut + 0.1 * noise).half()
    else:
        tensors["codes"] = integers(-32768, 32768, (n, k // 8), torch.int16)
        if spec.bits == 3:
            tensors["residual_codes"] = integers(0, 256, (n, k // 8), torch.uint8)
        if spec.bits == 4:
            tensors["residual_codes"] = integers(-32768, 32768, (n, k // 8), torch.int16)
    return tensors
