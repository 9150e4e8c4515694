# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with one random change each, and the proof that every one of them ends in a sentence."""

import json
import random
import shutil

import pytest

from quip_vllm.checkpoint.layers import read_layers

COUNT = 500


def end_in_a_sentence(folder, work, seed, change):
    """Reads COUNT mutants of a checkpoint of one file.

    Args:
        folder: of the checkpoint.
        work: an empty folder, for copies.
        seed: of the changes.
        change: (random numbers, the file's header, the bytes behind it, config.json) -> the bytes to write behind the
            header. It changes header and config.json in place, so that no checkpoint survives unnoticed.
    """
    whole = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    raw = whole[8 + length :]
    draw = random.Random(seed)
    for i in range(COUNT):
        header, model = json.loads(whole[8 : 8 + length]), json.loads((folder / "config.json").read_text())
        body = change(draw, header, raw, model)
        copy = work / str(i)
        copy.mkdir()
        text = json.dumps(header).encode()
        (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
        (copy / "config.json").write_text(json.dumps(model))
        with pytest.raises(ValueError) as caught:
            for _ in read_layers(copy):
                pass
        assert 20 < len(str(caught.value)) < 1500 and str(caught.value).count("\n") < 3
        shutil.rmtree(copy)
