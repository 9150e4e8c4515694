# SPDX-License-Identifier: Apache-2.0
"""Which layers get how many bits, the defaults, and what is refused before a run begins."""

import json

import pytest

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.quantizer.settings import Settings, default_code

MIXED = (("a", LayerFormat("grid", 5)), ("b", None), ("c", LayerFormat("hyb", 2)))


def settings(**changes):
    return Settings(**{"model": "m", "code": "1mad", "bits": 2, **changes})


def test_layer_format():
    chosen = settings(ignore=("layers.0", "gate"), overrides=(("mlp", 3), ("down_proj$", 8)))
    assert chosen.layer_format("layers.1.q_proj") == LayerFormat("1mad", 2)
    assert chosen.layer_format("layers.1.mlp.up_proj") == LayerFormat("1mad", 3)
    assert chosen.layer_format("layers.1.mlp.down_proj") == LayerFormat("1mad", 8)  # the last override that matches
    assert chosen.layer_format("layers.0.mlp.down_proj") is None  # ignored before overridden
    assert chosen.layer_format("layers.1.mlp.gate_proj") is None


def test_defaults():
    usual, own, text = settings(), settings(calibration="self"), settings(calibration="text.txt", sequence_length=7)
    assert (usual.calibration, usual.sequences, usual.sequence_length) == ("bundle", 64, 1024)
    assert (own.sequences, own.sequence_length) == (64, 256)
    assert (text.sequences, text.sequence_length) == (256, 7)
    mixed = [settings(calibration=named) for named in ("bundle,text.txt", "text.txt,self")]
    assert [one.sequences for one in mixed] == [64, 256]  # those of the source named first
    assert [one.sequence_length for one in mixed] == [1024, 2048]
    assert [default_code("qtip", bits) for bits in (1, 2, 3)] == ["hyb", "hyb", "1mad"]
    assert default_code("quip_sharp", 4) == "e8p" and default_code("quip", 4) == "grid"


@pytest.mark.parametrize(
    ("rounding", "two_sided", "drift", "steps"),
    [
        ("ldlq", True, 0.2, None),
        ("nearest", False, 0.2, None),
        ("greedy", False, 0.2, None),
        ("discquant", False, 0.0, 64),
    ],
)
def test_defaults_of_each_rounding(rounding, two_sided, drift, steps):
    chosen = settings(code="grid", rounding=rounding)
    assert (chosen.two_sided, chosen.drift_correction, chosen.rounding_steps) == (two_sided, drift, steps)


def test_to_dict_is_json():
    raw = settings(overrides=(("a", 3),), ignore=("b",)).to_dict()
    assert json.loads(json.dumps(raw)) == raw
    assert (raw["code"], raw["overrides"], raw["ignore"]) == ("1mad", [["a", 3]], ["b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "table"}, "code is table, whose tables come with checkpoints of other programs"),
        ({"bits": 9}, "bits is 9: qtip with code 1mad has 1, 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 5, "code": "hyb"}, "bits is 5: qtip with code hyb has 1, 2, 3, 4"),
        ({"code": "e8p", "lm_head": 7}, "bits is 7: quip_sharp with code e8p has 2, 3, 4"),
        ({"overrides": (("a", 0),)}, "bits is 0: "),
        ({"overrides": (("(", 4),)}, r"'\(' is not a regular expression"),
        ({"token_weights": 1.5}, "token_weights is 1.5: give a share from 0 to 1"),
        ({"ignore": ("[",)}, r"'\[' is not a regular expression"),
        ({"sequences": 0}, "sequences is 0: it must be at least 1"),
        ({"calibration": "bundle,,self"}, "calibration is 'bundle,,self': give sources with one comma between two"),
        ({"calibration": ""}, "calibration is '': give sources"),
        ({"calibration": "self,a,b", "sequences": 2}, "sequences is 2: give at least one for each of the 3 sources"),
        ({"sequence_length": -4}, "sequence_length is -4: it must be at least 1"),
        ({"seed": -3}, "seed is -3: give a number from 0 to 9223372036854775807"),
        ({"seed": 10**23}, "seed is 100000000000000000000000: give a number from 0 to 9223372036854775807"),
        ({"split": 0}, "split is 0: give a number of ranks"),
        ({"split": 2, "hadamard_block": 64}, "split is 2: .* no --hadamard-block"),
        ({"rounding": "best"}, "rounding is 'best': it must be one of ldlq, nearest, greedy, discquant"),
        ({"rounding": "greedy"}, "rounding is greedy, .* code 1mad has no level of its own: give --method quip"),
        ({"rounding": "discquant", "code": "e8p"}, "rounding is discquant, .* code e8p has no level of its own"),
        ({"rounding": "greedy", "code": "grid", "plan": MIXED}, "rounding is greedy, .* code hyb has no level"),
        ({"rounding": "nearest", "two_sided": True}, "rounding is nearest, .*leave --two-sided away"),
        ({"rounding": "discquant", "code": "grid", "drift_correction": 0.1}, "drift_correction is 0.1: .* leave it"),
        ({"rounding_steps": 8}, "rounding_steps is 8 with rounding ldlq: give at least 1, with discquant"),
        ({"rounding": "discquant", "code": "grid", "rounding_steps": 0}, "rounding_steps is 0 with rounding discquant"),
        ({"drift_correction": 1.5}, "drift_correction is 1.5: give a share from 0 to 1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
