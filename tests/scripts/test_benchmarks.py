# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts on tiny shapes: checkpoints are valid, ratios and CSV files right, plots get drawn."""

import importlib.util
import sys

import bench_encode
import bench_experts
import bench_kernels
import bench_serving
import make_synthetic_checkpoint
import make_synthetic_gguf
import numpy as np
import pytest
import torch
from benchmarking import FORMATS, origin, read_rows, write_rows
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from quip_vllm.checkpoint.store import CheckpointReader, read_json

HEAD = ["--lm-head", "4"]
EXPERTS = ["--experts", "4", "--top-k", "2"]
TINY = ["--hidden", "64", "--mlp", "128", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab", "96"]


def synthetic(out, *arguments):
    assert make_synthetic_checkpoint.main([str(out), *TINY, *arguments]) == 0
    return out


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bf16", []),
        ("bf16", EXPERTS),
        ("quip_sharp-3", []),
        ("quip_sharp-2", HEAD),
        ("quip_sharp-2", EXPERTS),
        ("qtip-1mad-2", HEAD),
        ("qtip-hyb-4", []),
    ],
)
def test_a_synthetic_checkpoint_loads_and_its_logits_are_finite(name, head, tmp_path):
    pytest.importorskip("transformers")
    from quip_vllm.evaluation.loading import load_model

    described = [name]
    if name in FORMATS:
        stored = FORMATS[name]
        code = ["--code", stored.code] if stored.format.method == "qtip" else []
        described = [stored.format.method, "--bits", str(stored.bits), *code]
    model = load_model(str(synthetic(tmp_path / "out", "--format", *described, *head)))
    with torch.inference_mode():
        logits = model(torch.arange(96)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_projections_that_read_one_activation_share_su(tmp_path):
    reader = CheckpointReader(synthetic(tmp_path / "out", "--format", "quip_sharp"))
    names = [f"model.layers.1.self_attn.{name}_proj.su" for name in "qkv"]
    first, *others = reader.read(names).values()
    assert all(torch.equal(first, other) for other in others)


def test_a_gptq_checkpoint_has_the_shapes_of_gptq(tmp_path):
    folder = synthetic(tmp_path / "out", "--format", "gptq-int4")
    described = read_json(folder / "config.json")["quantization_config"]
    assert described["group_size"] == 64  # 128 does not divide the hidden size
    prefix = "model.layers.0.mlp.down_proj."
    shapes = {name.removeprefix(prefix): shape for name, shape in CheckpointReader(folder).shapes.items()}
    wanted = {"qweight": (16, 64), "qzeros": (2, 8), "scales": (2, 64), "g_idx": (128,)}
    assert {name: shapes[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "quip_sharp", "--bits", "5"], "bits is 5"),
        (["--format", "quip_sharp", "--heads", "5"], "--heads 5"),
        (["--format", "bf16", "--lm-head", "4"], "--lm-head is 4"),
        (["--format", "gptq-int4", "--mlp", "24"], "--mlp is 24"),
        (["--format", "gptq-int4", "--experts", "4"], "--experts is 4, --top-k 4, --format gptq-int4"),
        (["--format", "bf16", "--experts", "4", "--top-k", "5"], "--top-k 5"),
        (["--format", "quip_sharp", "--hadamard-block", "no"], "--hadamard-block is no"),
    ],
)
def test_a_shape_or_rate_that_is_not_there_is_refused(tmp_path, capsys, arguments, message):
    assert make_synthetic_checkpoint.main([str(tmp_path / "out"), *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_ratios_are_of_medians_and_an_error_is_a_row():
    found = {
        "bf16": {"decode 1": [4.0, 2.0, 3.0], "prefill 1": [100.0]},
        "gptq-int4": {"decode 1": [6.0]},
        "ours": {"decode 1": [12.0, 10.0, 90.0]},
    }
    rows = bench_serving.table(found, {"bf16": "", "gptq-int4": "", "ours": "it broke"}, "bf16", "gptq-int4")
    by_place = {(row["name"], row.get("phase")): row for row in rows}
    ours = by_place["ours", "decode"]
    assert (ours["tokens_per_s"], ours["over_bf16"], ours["over_int4"]) == (12.0, 4.0, 2.0)
    assert (ours["lowest"], ours["highest"], ours["samples"], ours["batch"]) == (10.0, 90.0, 3, 1)
    assert "over_int4" not in by_place["bf16", "prefill"]
    assert by_place["ours", None] == {"name": "ours", "error": "it broke"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
def test_experts_are_timed_beside_those_of_vllm(tmp_path, monkeypatch):
    shape = ["--hidden", "64", "--inner", "32", "--experts", "4", "--top-k", "2", "--layers", "1"]
    more = ["--rows", "1", "5", "--formats", "quip_sharp-2", "--seconds", "0", "--csv", str(tmp_path / "experts.csv")]
    assert run(bench_experts, monkeypatch, *shape, *more) == 0
    rows = read_rows(tmp_path / "experts.csv")
    assert [(row["format"], row["rows"]) for row in rows] == [(n, m) for m in "15" for n in ("bf16", "quip_sharp-2")]
    assert all(float(row["microseconds"]) > 0 for row in rows) and float(rows[0]["over_bf16"]) == 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm")
def test_a_process_that_fails_leaves_its_error_and_the_next_one_runs(tmp_path, monkeypatch):
    folders = [synthetic(tmp_path / name, "--format", "bf16") for name in ("first", "second")]
    for folder in folders:
        (folder / "config.json").unlink()
    arguments = [f"{folder.name}={folder}" for folder in folders]
    assert run(bench_serving, monkeypatch, *arguments, "--csv", tmp_path / "serving.csv") == 1
    rows = read_rows(tmp_path / "serving.csv")
    assert [row["name"] for row in rows] == ["first", "second"]
    assert all("config.json cannot be read" in row["error"] for row in rows)


def test_csv_rows_come_back_and_name_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/bench.py", "name=/else/where/model", "--csv", "/a/b.csv"])
    row = {"format": "x", "speed": 1 / 3, **origin(2)}
    write_rows(tmp_path / "new" / "t.csv", ["format", "speed", "missing", *origin(2)], [row])
    (found,) = read_rows(tmp_path / "new" / "t.csv")
    assert found["command"] == "python scripts/bench/bench.py name=model --csv b.csv"
    assert (found["speed"], found["missing"], found["threads"]) == ("0.33333", "", "2")


def test_kernel_figures_are_consistent():
    row = bench_kernels.figures("quip_sharp-2", n=200, k=500, m=4, time=1e-3, size=7)
    assert (row["microseconds"], row["gweights_per_s"], row["tmac_per_s"]) == (1000.0, 0.1, 0.0004)


def test_encoders_are_measured(tmp_path, monkeypatch):
    out = tmp_path / "encode.csv"
    sizes = ["--sequences", 2, "--vectors", 64, "--threads", torch.get_num_threads()]
    assert run(bench_encode, monkeypatch, "--formats", "qtip-hyb-2", *sizes, "--csv", out) == 0
    assert [(row["what"], row["format"]) for row in read_rows(out)] == [
        ("e8p", "quip_sharp-2"),
        ("viterbi", "qtip-hyb-2"),
    ]
    assert all(0 < float(row["distortion"]) < 1 and row["equal"] == "1" for row in read_rows(out))
    assert all(row["device"] == "cpu" for row in read_rows(out))


def test_a_portable_search_that_differs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_encode, "cpu_tier", lambda: "portable")
    monkeypatch.setattr(bench_encode, "lattice", lambda *_, **__: {"what": "e8p", "equal": 0.5})
    given = ["--formats", "--threads", torch.get_num_threads(), "--csv", tmp_path / "encode.csv"]
    assert run(bench_encode, monkeypatch, *given) == 1


def test_kernels_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "memory_bandwidth", lambda: 10.0)
    shapes = ["--shapes", "64x32", "--rows", 1, 4, "--working-set", 0, "--threads", torch.get_num_threads()]
    formats = ["--formats", "quip_sharp-2", "qtip-1mad-2"]
    assert run(bench_kernels, monkeypatch, *formats, *shapes, "--csv", tmp_path / "cpu_kernels.csv") == 0
    kernels = read_rows(tmp_path / "cpu_kernels.csv")
    assert len(kernels) == 2 * 3
    assert all(bool(row["share_of_bound"]) == (row["rows"] == "1" and row["format"] != "dense") for row in kernels)


def test_gguf_files_have_the_shape_of_the_checkpoints(tmp_path):
    file = tmp_path / "small.gguf"
    shape = "--hidden 256 --mlp 512 --layers 1 --heads 4 --kv-heads 2 --vocab 96"
    assert make_synthetic_gguf.main([str(file), "--type", "Q2_K", *shape.split()]) == 0
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert tensors["blk.0.ffn_down.weight"].shape.tolist() == [512, 256]  # inputs first, as GGUF has them
    assert tensors["blk.0.attn_k.weight"].shape.tolist() == [256, 128]
    assert tensors["token_embd.weight"].tensor_type.name == "Q4_K"
    assert np.isfinite(dequantize(tensors["blk.0.ffn_up.weight"].data, GGMLQuantizationType.Q2_K)).all()
    assert make_synthetic_gguf.main([str(file), "--type", "Q2_K"]) == 2
