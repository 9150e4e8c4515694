# SPDX-License-Identifier: Apache-2.0
"""quantization_config: what is written is read back, and everything else is refused in one sentence."""

import pytest

from quip_vllm.checkpoint.config import CheckpointConfig, Head

QTIP = CheckpointConfig("qtip", 2, "hyb", 128, ("lm_head", "model.layers.1"), {"model.layers.0.o_proj": 4})
HEAD = {"module": "model.embed_tokens", "bits": 4, "tied": True}
TIED = CheckpointConfig("quip_sharp", 2, modules_to_not_convert=("lm_head",), head=Head(**HEAD))


@pytest.mark.parametrize("config", [QTIP, CheckpointConfig("quip_sharp", 3), TIED])
def test_round_trip(config):
    assert CheckpointConfig.from_dict(config.to_dict()) == config


def test_to_dict():
    assert QTIP.to_dict() == {
        "quant_method": "qtip",
        "format_version": 1,
        "bits": 2,
        "code": "hyb",
        "state_bits": 16,
        "vector_dim": 2,
        "hadamard_block": 128,
        "modules_to_not_convert": ["lm_head", "model.layers.1"],
        "overrides": {"model.layers.0.o_proj": {"bits": 4}},
    }


def test_head():
    assert TIED.to_dict()["head"] == HEAD
    assert TIED.bits_of("model.embed_tokens") == 4 and TIED.is_head("model.embed_tokens")
    assert TIED.bits_of("lm_head") is None and not TIED.is_head("lm_head") and not QTIP.is_head("lm_head")
    assert TIED.bits_of("model.layers.0.q_proj") == 2


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (4, "head is 4: "),
        ([HEAD], "head is "),
        ({}, "head.module is None: "),
        ({**HEAD, "module": ""}, "head.module is '': "),
        ({**HEAD, "module": ["lm_head"]}, "head.module is "),
        ({**HEAD, "tied": "yes"}, "head.tied is 'yes': "),
        ({**HEAD, "tied": 1}, "head.tied is 1: "),
        ({**HEAD, "bits": None}, "bits is None: "),
        ({**HEAD, "bits": 5}, "bits is 5: quip_sharp has 2, 3, 4"),
        ({**HEAD, "module": "lm_head"}, "head.module is 'lm_head', which overrides or modules_to_not_convert name"),
    ],
)
def test_hostile_head(head, message):
    with pytest.raises(ValueError) as caught:
        CheckpointConfig.from_dict({**TIED.to_dict(), "head": head})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("model.layers.0.q_proj", 2),
        ("model.layers.0.o_proj", 4),
        ("lm_head", None),
        ("model.layers.1", None),
        ("model.layers.1.q_proj", None),
        ("model.layers.10.q_proj", 2),
    ],
)
def test_bits_of(name, bits):
    assert QTIP.bits_of(name) == bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq': it must be one of qtip, quip_sharp"),
        ({"quant_method": ["qtip"]}, "quant_method is "),
        ({"quant_method": {}}, "quant_method is "),
        ({"format_version": 2}, "format_version is 2: "),
        ({"format_version": None}, "format_version is None: "),
        ({"code": "4mad"}, "code is '4mad': it must be one of 1mad, 3inst, hyb, lut"),
        ({"code": None}, "code is None: "),
        ({"code": []}, "code is "),
        ({"bits": 10**30}, "bits is 1000"),
        ({"bits": "2"}, "bits is '2': "),
        ({"bits": 2.0}, "bits is 2.0: "),
        ({"bits": True}, "bits is True: "),
        ({"bits": None}, "bits is None: "),
        ({"bits": 5}, "bits is 5: qtip with code hyb has 1, 2, 3, 4; choose one of them"),
        ({"state_bits": 12}, "state_bits is 12: "),
        ({"vector_dim": 1}, "vector_dim is 1: "),
        ({"hadamard_block": 96}, "hadamard_block is 96: "),
        ({"hadamard_block": 0}, "hadamard_block is 0: "),
        ({"hadamard_block": -8}, "hadamard_block is -8: "),
        ({"hadamard_block": "64"}, "hadamard_block is '64': "),
        ({"hadamard_block": True}, "hadamard_block is True: "),
        ({"overrides": ["x"]}, "overrides is "),
        ({"overrides": {"x": 4}}, "overrides is "),
        ({"overrides": {"x": {"bits": 99}}}, "bits is 99: "),
        ({"overrides": {"x": {}}}, "bits is None: "),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head': "),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is "),
    ],
)
def test_hostile(changes, message):
    with pytest.raises(ValueError) as caught:
        CheckpointConfig.from_dict({**QTIP.to_dict(), **changes})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_code_goes_with_qtip_only():
    with pytest.raises(ValueError, match="quip_sharp has none"):
        CheckpointConfig("quip_sharp", 2, "lut")
    with pytest.raises(ValueError, match="qtip needs one"):
        CheckpointConfig("qtip", 2)
