# SPDX-License-Identifier: Apache-2.0
"""`inspect --tensor-parallel` says of a checkpoint what vLLM's layers then do on every rank."""

import json

import exl3_files
import pytest
import torch
from safetensors.torch import save_file
from served_layers import FUSED, build, finish, load, random_tensors
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from quip_vllm.checkpoint.config import CheckpointConfig, Head, LayerFormat
from quip_vllm.cli import main
from quip_vllm.vllm_plugin.config import QuipConfig
from quip_vllm.vllm_plugin.ranks import verdict

pytestmark = pytest.mark.usefixtures("set_rank")
HEAD_WIDTH = 32


class Shape:
    """A model of one decoder layer: sizes, code, and how its rotations are cut."""

    def __init__(self, hidden, heads, keys, middle, code, vocabulary=None, block=None, split=1, joined=()):
        self.heads, self.keys, self.hidden, self.middle, self.vocabulary = heads, keys, hidden, middle, vocabulary
        inner, outer = heads * HEAD_WIDTH, keys * HEAD_WIDTH
        sizes = {"q_proj": (inner, hidden), "k_proj": (outer, hidden), "v_proj": (outer, hidden)}
        sizes |= {"gate_proj": (middle, hidden), "up_proj": (middle, hidden)}
        for name in joined:
            parts = [sizes.pop(part) for part in FUSED[name]]
            sizes[name] = (sum(n for n, _ in parts), hidden)
        self.sizes = sizes | {"o_proj": (hidden, inner), "down_proj": (hidden, middle)}
        usual = LayerFormat(code, 2)
        across, along = usual._replace(output_chunks=split), usual._replace(input_chunks=split)
        others = {self.name(leaf): along for leaf in ("o_proj", "down_proj")}
        head = Head("lm_head", usual, tied=False) if vocabulary else None
        self.config = CheckpointConfig(across, block, (), others, head)
        self.tensors = {leaf: random_tensors(code, 2, *size) for leaf, size in self.sizes.items()}
        if vocabulary:
            self.tensors["lm_head"] = random_tensors(code, 2, vocabulary, hidden)

    def name(self, leaf):
        module = "mlp" if leaf in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
        return leaf if leaf == "lm_head" else f"model.layers.0.{module}.{leaf}"

    def write(self, folder):
        folder.mkdir()
        model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
        model |= {"hidden_size": self.hidden, "intermediate_size": self.middle, "vocab_size": self.vocabulary or 512}
        model |= {"num_attention_heads": self.heads, "num_key_value_heads": self.keys, "head_dim": HEAD_WIDTH}
        (folder / "config.json").write_text(json.dumps(model | {"quantization_config": self.config.to_dict()}))
        tensors = {f"{self.name(leaf)}.{key}": one for leaf, own in self.tensors.items() for key, one in own.items()}
        save_file(tensors, folder / "model.safetensors")
        return folder

    def serve(self):
        """Builds and loads the layers of a rank, as vLLM's Llama does."""
        config = QuipConfig(self.config)
        config.packed_modules_mapping = dict(FUSED)
        for leaf, kind, sizes in (
            ("qkv_proj", QKVParallelLinear, (self.hidden, HEAD_WIDTH, self.heads, self.keys)),
            ("gate_up_proj", MergedColumnParallelLinear, (self.hidden, [self.middle] * 2)),
            ("o_proj", RowParallelLinear, (self.heads * HEAD_WIDTH, self.hidden)),
            ("down_proj", RowParallelLinear, (self.middle, self.hidden)),
        ):
            layer = build(kind, config, *sizes, prefix=self.name(leaf))
            ids = ("q", "k", "v") if leaf == "qkv_proj" else (0, 1)
            if leaf in self.tensors:
                load(layer, self.tensors[leaf])
            else:
                for part, shard in zip(FUSED[leaf], ids, strict=True):
                    load(layer, self.tensors[part], shard)
            finish(layer)
        head = ParallelLMHead(
            self.vocabulary or 512, self.hidden, params_dtype=torch.float32, quant_config=config, prefix="lm_head"
        )
        if self.vocabulary:
            load(head, self.tensors["lm_head"])
            finish(head)


SHAPES = {
    "full width": Shape(128, 4, 4, 256, "e8p"),
    "blocks of 32": Shape(128, 8, 4, 256, "hyb", block=32),
    "blocks of 128": Shape(256, 8, 8, 512, "e8p", block=128),
    "chunks of 4": Shape(128, 8, 2, 512, "1mad", split=4),
    "chunks of 2, a head": Shape(128, 4, 4, 384, "e8p", vocabulary=200, split=2),
    "tiles across a head": Shape(128, 8, 8, 256, "hyb", vocabulary=64, block=16),
    "three heads": Shape(96, 3, 3, 192, "1mad", vocabulary=180, block=32),
    "joined on disk, blocks": Shape(128, 4, 2, 256, "1mad", block=32, joined=("qkv_proj", "gate_up_proj")),
    "joined on disk, chunks": Shape(128, 4, 2, 256, "1mad", split=2, joined=("gate_up_proj",)),
    "nine heads": Shape(144, 9, 9, 144, "e8p", vocabulary=570, block=16),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_verdict_is_what_serving_does(set_rank, tmp_path, kind):
    folder, served = SHAPES[kind].write(tmp_path / "folder"), []
    for ranks in range(1, 10):
        try:
            for rank in range(ranks):
                set_rank(rank, ranks)
                SHAPES[kind].serve()
            served.append(ranks)
        except (ValueError, AssertionError):  # vLLM asserts that sizes can be divided
            pass
    found = verdict(folder, 9)
    assert found["allowed"] == served
    assert bool(found["refused"]) == (9 not in served)


@pytest.mark.parametrize(("head", "allowed"), [(False, [1, 2]), (True, [1])])
def test_exl3_is_cut_at_its_blocks_of_128(tiny_model, tmp_path, head, allowed):
    """Also within slices; a head of 272 tokens is cut at 160, vLLM's padding included."""
    source = tiny_model("Llama", hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    exl3_files.write(source, tmp_path / "exl3", "mul1", head=head, widths=(256, 256))
    found = verdict(tmp_path / "exl3", 4)
    assert found["allowed"] == allowed
    assert any("model.layers.*.self_attn.q_proj in tensor-parallel shares of 64" in one for one in found["refused"])


def test_reasons_and_remedies_by_kind_of_layer(tmp_path, capsys):
    folder = SHAPES["full width"].write(tmp_path / "folder")
    assert main(["inspect", str(folder), "--tensor-parallel", "2"]) == 1
    first, *reasons = capsys.readouterr().out.splitlines()
    assert first == f"{folder}: of 1 to 2 tensor-parallel ranks these can serve it: 1"
    assert len(reasons) == 7 and all("--hadamard-block" in one for one in reasons)
    assert sum("model.layers.*.self_attn.q_proj: output of size 128 is rotated as a w" in one for one in reasons) == 1
    assert main(["inspect", str(folder), "--tensor-parallel", "1"]) == 0
    assert main(["inspect", str(folder), "--tensor-parallel", "0"]) == 2
    assert "--tensor-parallel is 0: give a number of ranks" in capsys.readouterr().err
