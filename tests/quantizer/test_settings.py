# SPDX-License-Identifier: Apache-2.0
"""Which layers get how many bits, and what is refused before a run begins."""

import json

import pytest

from quip_vllm.quantizer.settings import Settings


def settings(**changes):
    return Settings(**{"model": "m", "bits": 2, "code": "1mad", **changes})


def test_bits_of():
    chosen = settings(ignore=("layers.0", "gate"), overrides=(("mlp", 3), ("down_proj$", 8)))
    assert chosen.bits_of("layers.1.q_proj") == 2
    assert chosen.bits_of("layers.1.mlp.up_proj") == 3
    assert chosen.bits_of("layers.1.mlp.down_proj") == 8  # the last override that matches
    assert chosen.bits_of("layers.0.mlp.down_proj") is None  # ignored before overridden
    assert chosen.bits_of("layers.1.mlp.gate_proj") is None


def test_to_dict_is_json():
    raw = settings(overrides=(("a", 3),), ignore=("b",)).to_dict()
    assert json.loads(json.dumps(raw)) == raw
    assert (raw["code"], raw["overrides"], raw["ignore"]) == ("1mad", [["a", 3]], ["b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "bits is 9: qtip with code 1mad has 1, 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 5, "code": "hyb"}, "bits is 5: qtip with code hyb has 1, 2, 3, 4"),
        ({"bits": 5, "code": "e8p"}, "bits is 5: quip_sharp with code e8p has 2, 3, 4"),
        ({"overrides": (("a", 0),)}, "bits is 0: "),
        ({"overrides": (("(", 4),)}, r"'\(' is not a regular expression"),
        ({"ignore": ("[",)}, r"'\[' is not a regular expression"),
        ({"sequences": 0}, "sequences is 0: it must be at least 1"),
        ({"sequence_length": -4}, "sequence_length is -4: it must be at least 1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
