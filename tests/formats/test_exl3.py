# SPDX-License-Identifier: Apache-2.0
"""EXL3's streams and codes against hashed vectors, and against its specification in numpy (exl3_layers)."""

import hashlib

import exl3_layers
import numpy
import pytest
import torch
from numerics import FLOAT32_LINEAR, HALF_ACTIVATIONS, relative

from quip_vllm.formats import exl3
from quip_vllm.formats.spec import FORMATS, LinearSpec, TileOrder
from quip_vllm.formats.trellis import unpack
from quip_vllm.ops import dequantize

TABLES = {
    "3inst": "ad88de2dcff5bb05",
    "mcg": "95383563929baa9d",
    "mul1": "bc48d02cb1c14939",
}
STATES = {  # of the tile of ramp bytes: 0, 1, 2, 3 and 255
    1: "782e f05d e0bb c177 3c17",
    2: "72dd cb77 2dde b77a dcb7",
    3: "e2bb 15de aef4 77a5 7c57",
    4: "cf77 f77a 77a5 7a55 1cf7",
    5: "92ef 5de9 bd2a a553 bc97",
    6: "0dde 77a5 e954 5530 5c37",
    7: "6bbd de95 4aa6 5300 fcd7",
    8: "777a 7a55 5530 300b 9c77",
}
TILES = {  # 3inst, mcg, mul1
    1: "243017e12ed9eb3c d594b4f0c45a91d4 8729352a2af43046",
    2: "51abe88ac1bd0afe a9e59c6d904cb70d 4dd72bab12dc7329",
    3: "7ad1fe91b5ef72e6 18907db6051d1d59 8c37fa55519070fa",
    4: "f2a9d2e9408940b9 2e0502c0798daff4 530ca6edc1845330",
    5: "980039ca193fc658 0fb4e9f154e88d1d d2b8ab0143cdba8d",
    6: "8e14368464cb1ca6 204a9b0e5a15a16c 794d1a669e2f2e42",
    7: "c55a6f637ccb167e a2375c1c7e24eae3 cf54e29233382762",
    8: "3b1f712a62665cb6 6b96be65634ca3fe 247ece2320cf279c",
}
CODES = ["3inst", "mcg", "mul1"]


def sha16(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def words(raw, *shape):
    return torch.from_numpy(numpy.frombuffer(raw, "<i2").copy()).view(shape)


def decoded(trellis, code):
    """fp16 [k, n]."""
    bits = trellis.shape[-1] // 16
    return FORMATS[code].decode({"packed": exl3.packed(trellis)}, bits, TileOrder.MMA_SWAPPED).T.half()


@pytest.mark.parametrize("code", CODES)
def test_every_state(code):
    values = FORMATS[code].values().flatten()
    assert sha16(values.half()) == TABLES[code]
    assert torch.equal(values.half().float(), values)
    assert values.tolist() == exl3_layers.values(code).astype(float).tolist()


@pytest.mark.parametrize(
    ("code", "first", "others", "deviation", "distinct"),
    [
        ("mcg", [1.84375, 0.134521, -0.759277, 0.839844], {0x1234: 1.514648, 65535: 0.850098}, 1.244112, 10746),
        ("mul1", [-3.453125, 0.641113, -0.448486, 0.194458], {0x1234: -0.577148, 65535: -0.651367}, 1.00031, 913),
    ],
)
def test_values_as_published(code, first, others, deviation, distinct):
    values = FORMATS[code].values().flatten().double()
    assert values[:4].tolist() == pytest.approx(first, abs=1e-6)
    assert {x: values[x].item() for x in others} == pytest.approx(others, abs=1e-6)
    assert values.std(correction=0).item() == pytest.approx(deviation, abs=1e-5)
    assert len(values.unique()) == distinct


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_tile_as_published(bits):
    trellis = words(exl3_layers.ramp(32 * bits), 1, 1, 16 * bits)
    states = unpack(exl3.packed(trellis)[0], bits, 1)
    assert " ".join(f"{int(states[t]):04x}" for t in (0, 1, 2, 3, 255)) == STATES[bits]
    assert [sha16(decoded(trellis, code)) for code in CODES] == TILES[bits].split()


def test_weights_of_a_tile_as_published():
    two, four = (words(exl3_layers.ramp(32 * bits), 1, 1, 16 * bits) for bits in (2, 4))
    published = {
        "3inst": [-2.392578, 0.136475, -0.095703, 1.612305],
        "mcg": [0.426758, 1.208984, -0.133789, -0.821289],
        "mul1": [0.702148, -1.578125, 1.053711, 1.337891],
    }
    for code, wanted in published.items():
        assert decoded(two, code)[0, :4].tolist() == pytest.approx(wanted, abs=1e-6)
    tile = decoded(two, "mul1")
    assert [tile[1, 0], tile[8, 0], tile[0, 8]] == pytest.approx([1.291016, -2.154297, 0.667969], abs=1e-6)
    assert decoded(four, "mul1")[0, :4].tolist() == pytest.approx([2.021484, 0.790039, -0.049194, 0.174072], abs=1e-6)


@pytest.mark.parametrize(
    ("code", "bits", "digest", "corners", "norm"),
    [
        ("mul1", 2, "cc70869d23ae8802", [0.190563, 0.554180, -0.576938, 2.482746], 362.142936),
        ("mcg", 3, "33cb8ac61b3dca1b", [1.319874, 0.682023, 1.317201, 15.572968], 453.823255),
        ("3inst", 4, "d59f6c4611bf3b40", [0.175054, 0.191327, -0.144328, 2.545077], 451.995157),
    ],
)
def test_a_layer_as_published(code, bits, digest, corners, norm):
    k, n = 128, 256
    trellis = words(exl3_layers.lcg(k * n // 8 * bits), k // 16, n // 16, 16 * bits)
    assert sha16(decoded(trellis, code)) == digest
    i, j = torch.arange(k), torch.arange(n)
    suh, svh = (-1.0) ** i * (1 + i / 256), (-1.0) ** (j // 3) * (0.5 + j / 128)
    spec = LinearSpec(code, bits, k, (n,), exl3.BLOCK, tile_order=TileOrder.MMA_SWAPPED)
    weight = dequantize(spec, {"packed": exl3.packed(trellis), "su": suh.half(), "sv": svh.half()}).T
    found = [weight[0, 0], weight[0, 1], weight[1, 0], weight[127, 255]]
    assert found == pytest.approx(corners, abs=2e-5)
    assert weight.double().norm().item() == pytest.approx(norm, abs=1e-3)


@pytest.mark.parametrize("words", [16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128])
def test_packing_is_undone(words):
    generator = torch.Generator().manual_seed(words)
    trellis = torch.randint(-32768, 32768, (3, 2, words), generator=generator).to(torch.int16)
    assert torch.equal(exl3.published(exl3.packed(trellis), words), trellis)


LAYERS = [(code, bits, bits) for code in CODES for bits in (1, 5, 8)]
LAYERS += [("mul1_half", bits, bits - 0.5) for bits in (2, 3, 4)]


@pytest.mark.parametrize(("code", "bits", "rate"), LAYERS)
def test_a_layer_against_the_specification(code, bits, rate):
    k, n = 256, 128
    generator = numpy.random.default_rng(bits)
    trellis = generator.integers(-32768, 32768, (k // 16, n // 16, int(16 * rate))).astype(numpy.int16)
    suh, svh = (generator.normal(size=size).astype(numpy.float16) for size in (k, n))
    spec = LinearSpec(code, bits, k, (n,), exl3.BLOCK, tile_order=TileOrder.MMA_SWAPPED)
    tensors = {"packed": exl3.packed(torch.from_numpy(trellis))}
    tensors |= {"su": torch.from_numpy(suh), "sv": torch.from_numpy(svh)}
    wanted = torch.from_numpy(exl3_layers.effective(trellis, code.removesuffix("_half"), suh, svh).T.copy())
    assert relative(dequantize(spec, tensors), wanted) < FLOAT32_LINEAR


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_are_those_of_gptqmodel(code, bits):
    """Bit for bit those of an independent decoder, where GPTQModel (7.7.0, Apache-2.0) is installed."""
    other = pytest.importorskip("gptqmodel.nn_modules.exllamav3_torch").ExllamaV3TorchLinear
    k, n = 128, 256
    generator = torch.Generator().manual_seed(bits)
    trellis = torch.randint(-32768, 32768, (k // 16, n // 16, 16 * bits), generator=generator).to(torch.int16)
    suh, svh = torch.randn(k, generator=generator).half(), torch.randn(n, generator=generator).half()
    mark = {code: torch.tensor(0)} if code in exl3.CODE_MARKS else {}
    tensors = {"trellis": trellis, "suh": suh, "svh": svh, **mark}
    layer = other.from_tensors(in_features=k, out_features=n, name="layer", tensors=tensors)
    assert torch.equal(decoded(trellis, code), layer._decode_inner_weight().half())
    spec = LinearSpec(code, bits, k, (n,), exl3.BLOCK, tile_order=TileOrder.MMA_SWAPPED)
    found = dequantize(spec, {"packed": exl3.packed(trellis), "su": suh, "sv": svh})
    # whose values of states are not rounded to half precision
    assert relative(found.T, layer.get_weight_tensor(torch.float32).double()) < HALF_ACTIVATIONS


def test_signs_of_older_files():
    found = exl3.signs(torch.tensor([0b0000000000000101, -32768], dtype=torch.int16))
    wanted = torch.ones(32, dtype=torch.float16)
    wanted[[0, 2, 31]] = -1
    assert torch.equal(found, wanted) and found.dtype is torch.float16
