# SPDX-License-Identifier: Apache-2.0
"""quantization_config: what is written is read back, and everything else is refused in one sentence."""

import json

import pytest

from quip_vllm.checkpoint.config import CheckpointConfig, Embedding, Head, LayerFormat
from quip_vllm.formats.spec import TileOrder

HYB = LayerFormat("hyb", 2)
MIXED = CheckpointConfig(HYB, 128, ("lm_head", "model.layers.1"), {"model.layers.0.o_proj": LayerFormat("e8p", 4)})
HEAD = {"module": "model.embed_tokens", "stored": {"code": "1mad", "bits": 4}, "tied": True}
TIED = CheckpointConfig(
    LayerFormat("e8p", 2), None, ("lm_head",), head=Head("model.embed_tokens", LayerFormat("1mad", 4), True)
)
EMBEDDING = {"module": "model.embed_tokens", "stored": {"code": "e8p", "bits": 3}}
UNTIED = CheckpointConfig(
    LayerFormat("e8p", 2),
    head=Head("lm_head", LayerFormat("1mad", 4), False),
    embedding=Embedding("model.embed_tokens", LayerFormat("e8p", 3)),
)


CHUNKED = LayerFormat("3inst", 2, TileOrder.ROW_MAJOR, 8)
CONVERTED = CheckpointConfig(  # with all that the quantizer does not write
    LayerFormat("mul1", 3, TileOrder.MMA_SWAPPED, padded_to=128),
    layers={"m.q": CHUNKED, "m.f": LayerFormat("hyb", 2, output_chunks=4), "m.g": HYB},
    parts={"m.f": (("a", 16), ("b", 32))},
    shapes={"m.g": (100, 64)},
)


@pytest.mark.parametrize("config", [MIXED, CheckpointConfig(LayerFormat("e8p", 3)), TIED, UNTIED, CONVERTED])
def test_round_trip(config):
    assert CheckpointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_part_is_stored_as_its_layer():
    assert CONVERTED.parts_of("m.f") == [("m.a", 16), ("m.b", 32)] and not CONVERTED.parts_of("m.q")
    assert CONVERTED.layer_format("m.b") == CONVERTED.layers["m.f"] and CONVERTED.layer_format("b") == CONVERTED.default
    assert CONVERTED.to_dict()["layers"]["m.f"] == {
        "code": "hyb",
        "bits": 2,
        "output_chunks": 4,
        "parts": [["a", 16], ["b", 32]],
    }


def test_to_dict():
    assert MIXED.to_dict() == {
        "quant_method": "qtip",
        "format_version": 1,
        "code": "hyb",
        "bits": 2,
        "hadamard_block": 128,
        "modules_to_not_convert": ["lm_head", "model.layers.1"],
        "layers": {"model.layers.0.o_proj": {"code": "e8p", "bits": 4}},
    }


def test_head():
    assert TIED.to_dict()["head"] == HEAD
    assert TIED.layer_format("model.embed_tokens") == LayerFormat("1mad", 4) and TIED.has_token_rows(
        "model.embed_tokens"
    )
    assert TIED.layer_format("lm_head") is None and not TIED.has_token_rows("lm_head")
    assert not MIXED.has_token_rows("lm_head")
    assert TIED.layer_format("model.layers.0.q_proj") == LayerFormat("e8p", 2)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ([HEAD], "head is "),
        ({}, "head.module is None: "),
        ({**HEAD, "module": ""}, "head.module is '': "),
        ({**HEAD, "tied": 1}, "head.tied is 1: "),
        ({**HEAD, "stored": 4}, "head.stored is 4: it must be an object with code and bits"),
        ({**HEAD, "stored": {"code": "e8p", "bits": 5}}, "bits is 5: quip_sharp with code e8p has 2, 3, 4"),
        ({**HEAD, "module": "lm_head"}, "head.module is 'lm_head', which layers or modules_to_not_convert name"),
    ],
)
def test_hostile_head(head, message):
    with pytest.raises(ValueError) as caught:
        CheckpointConfig.from_dict({**TIED.to_dict(), "head": head})
    assert str(caught.value).startswith(message)


def test_embedding():
    assert UNTIED.to_dict()["embedding"] == EMBEDDING and "embedding" not in TIED.to_dict()
    assert UNTIED.layer_format("model.embed_tokens") == LayerFormat("e8p", 3)
    assert UNTIED.layer_format("lm_head") == LayerFormat("1mad", 4)
    assert UNTIED.has_token_rows("model.embed_tokens") and UNTIED.has_token_rows("lm_head")
    assert not UNTIED.has_token_rows("model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": 3}, "embedding is 3: it must be an object with module, stored"),
        ({"embedding": {**EMBEDDING, "module": None}}, "embedding.module is None: "),
        ({"embedding": {**EMBEDDING, "stored": {"code": "e8p"}}}, "bits is None: "),
        (
            {"layers": {"model.embed_tokens": EMBEDDING["stored"]}},
            "embedding.module is 'model.embed_tokens', which lay",
        ),
        ({"embedding": {**EMBEDDING, "module": "lm_head"}}, "embedding.module is 'lm_head', but head says how a tied"),
        ({"head": HEAD | {"module": "wte"}}, "embedding.module is 'model.embed_tokens', but head says how a tied"),
    ],
)
def test_hostile_embedding(changes, message):
    with pytest.raises(ValueError) as caught:
        CheckpointConfig.from_dict({**UNTIED.to_dict(), **changes})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("model.layers.0.q_proj", HYB),
        ("model.layers.0.o_proj", LayerFormat("e8p", 4)),
        ("lm_head", None),
        ("model.layers.1", None),
        ("model.layers.1.q_proj", None),
        ("model.layers.10.q_proj", HYB),
    ],
)
def test_layer_format(name, stored):
    assert MIXED.layer_format(name) == stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq': it must be one of quip_sharp, qtip"),
        ({"quant_method": ["qtip"]}, "quant_method is "),
        ({"quant_method": "quip_sharp"}, "code is 'hyb': it belongs to quant_method qtip, not quip_sharp"),
        ({"format_version": 2}, "format_version is 2: "),
        ({"format_version": None}, "format_version is None: "),
        ({"code": "4mad"}, "code is '4mad': it must be one of "),
        ({"code": []}, "code is "),
        ({"bits": 10**30}, "bits is 1000"),
        ({"bits": "2"}, "bits is '2': "),
        ({"bits": True}, "bits is True: "),
        ({"bits": None}, "bits is None: "),
        ({"bits": 5}, "bits is 5: qtip with code hyb has 1, 2, 3, 4; choose one of them"),
        ({"hadamard_block": 96}, "hadamard_block is 96: "),
        ({"hadamard_block": -8}, "hadamard_block is -8: "),
        ({"hadamard_block": "64"}, "hadamard_block is '64': "),
        ({"layers": ["x"]}, "layers is "),
        ({"layers": {"x": 4}}, "layers.x is 4: it must be an object with code and bits"),
        ({"layers": {"x": {"code": "hyb", "bits": 99}}}, "bits is 99: "),
        ({"layers": {"x": {"bits": 2}}}, "code is None: "),
        (
            {"layers": {"x": {"code": "hyb", "bits": 2, "order": "mma"}}},
            "layers.x has order: this quip_vllm knows code",
        ),
        ({"tile_order": "spiral"}, "tile_order is 'spiral': it must be one of mma, mma_swapped, row_major"),
        ({"input_chunks": 0}, "input_chunks is 0: it must be an integer from 1 to 65536"),
        ({"layers": {"x": {**HYB.to_dict(), "padded_to": 10**30}}}, "padded_to is 1000000000000000000000000000000: it"),
        ({"output_chunks": True}, "output_chunks is True: "),
        ({"layers": {"x": {**HYB.to_dict(), "padded_to": -128}}}, "padded_to is -128: "),
        ({"layers": {"x": {**HYB.to_dict(), "shape": [3]}}}, "layers.x.shape is [3]: it must be the layer's outputs"),
        ({"layers": {"x": {**HYB.to_dict(), "parts": [["a", 2]]}}}, "layers.x.parts is [['a', 2]]: it must be a list"),
        ({"layers": {"x": {**HYB.to_dict(), "parts": [["a", 2], ["a", 2]]}}}, "layers.x.parts is "),
        ({"layers": {"x": {**HYB.to_dict(), "parts": [["a", 2], 7]}}}, "layers.x.parts is "),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head': "),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is "),
    ],
)
def test_hostile(changes, message):
    with pytest.raises(ValueError) as caught:
        CheckpointConfig.from_dict({**MIXED.to_dict(), **changes})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
