# SPDX-License-Identifier: Apache-2.0
"""QuIP# and QTIP checkpoints that relaxml_files writes from the specification: read, converted, or refused."""

import json
import shutil

import mutated_files
import pytest
import relaxml_files
import torch
from numerics import FLOAT32_LINEAR, relative
from safetensors.torch import load_file, save_file

from quip_vllm import cli
from quip_vllm.checkpoint import convert as module
from quip_vllm.checkpoint.convert import convert
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.layers import read_config, read_layers
from quip_vllm.evaluation.loading import load_model

KINDS = {
    "e8p-2": lambda source, out: relaxml_files.write_quip_sharp(source, out, 2),
    "e8p-3": lambda source, out: relaxml_files.write_quip_sharp(source, out, 3, wscale=0.7),
    "e8p-4": lambda source, out: relaxml_files.write_quip_sharp(source, out, 4, rescaled=True),
    "hyb": lambda source, out: relaxml_files.write_qtip(source, out, 2, v_bits=4),
    "hyb-older": lambda source, out: relaxml_files.write_qtip(source, out, 4, older=True),
    "hyb-chunks": lambda source, out: relaxml_files.write_qtip(source, out, 3, split=True),
    "hyb-1": lambda source, out: relaxml_files.write_qtip(source, out, 1, skipped=("model.layers.0.self_attn.v_proj",)),
    "1mad": lambda source, out: relaxml_files.write_qtip(source, out, 3, "1mad"),
    "3inst": lambda source, out: relaxml_files.write_qtip(source, out, 2, "3inst"),
    "2mad": lambda source, out: relaxml_files.write_qtip(source, out, 2, "2mad", v_bits=3),
    "lut": lambda source, out: relaxml_files.write_qtip(source, out, 4, "lut"),
    "lut-12": lambda source, out: relaxml_files.write_qtip(source, out, 2, "lut", table_bits=12, dim=2, v_bits=5),
    "quantlut": lambda source, out: relaxml_files.write_qtip(source, out, 3, "quantlut"),
    "quantlut-2": lambda source, out: relaxml_files.write_qtip(source, out, 2, "quantlut", table_bits=9, dim=2),
}
ARCHITECTURES = ["Llama", "Qwen3", "Gemma3Text"]


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    """written(kind, architecture): a folder and the state dict of the dense model; never write in it."""
    made = {}

    def written(kind, architecture="Llama"):
        if (kind, architecture) not in made:
            out = tmp_path_factory.mktemp("relaxml") / "out"
            source = tiny_model(architecture, hidden_size=192, num_hidden_layers=2, head_dim=16)
            made[kind, architecture] = out, KINDS[kind](source, out)
        return made[kind, architecture]

    return written


def assert_dense(folder, state):
    found = load_model(str(folder)).state_dict()
    for name, wanted in state.items():
        assert relative(found[name], wanted.double()) < FLOAT32_LINEAR, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_source_and_result_are_the_dense_model_of_the_specification(written, tmp_path, kind, architecture):
    folder, state = written(kind, architecture)
    assert_dense(folder, state)
    done = convert(folder, tmp_path / "out")
    assert_dense(tmp_path / "out", state)
    layers = inspect(folder)["layers"]
    assert done == {"layers": len(layers), "shards": 1}
    same = ("name", "code", "bits", "shape")
    assert [[one[key] for key in same] for one in inspect(tmp_path / "out")["layers"]] == [
        [one[key] for key in same] for one in layers
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]


def test_config_keeps_what_the_source_said(written, tmp_path):
    folder, _ = written("e8p-2")
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    source = shutil.copytree(folder, tmp_path / "models--a--b" / "snapshots" / "0123abcd")
    (source / "LICENSE").write_text("of Llama")
    (source / "USE_POLICY.md").write_text("with care")
    convert(source, tmp_path / "out")
    before, after = (json.loads((one / "config.json").read_text()) for one in (source, tmp_path / "out"))
    origin = after.pop("quantization_config")["converted_from"]
    assert origin == {"quip_params": before.pop("quip_params"), "revision": "0123abcd", "name": "models--a--b"}
    assert after == before and (tmp_path / "out" / "LICENSE").read_text() == "of Llama"
    assert (tmp_path / "out" / "USE_POLICY.md").exists()


def test_vectors_stay_half_precision_where_they_are(written, tmp_path):
    for kind, dtype in (("e8p-2", torch.float16), ("hyb", torch.float16), ("e8p-3", torch.float32)):
        folder, _ = written(kind)
        name, _, tensors = next(iter(read_layers(folder)))
        assert name.endswith("down_proj") and tensors["su"].dtype is torch.float16
        assert tensors["sv"].dtype is (torch.float32 if kind == "hyb" else dtype)


def test_inspection_counts_what_is_stored(written):
    found = inspect(written("hyb")[0])
    layer = next(one for one in found["layers"] if one["name"] == "model.layers.0.self_attn.v_proj")
    stored = 32 * 192 // 2 + 2 * 192 + 4 * 32 + 2048 + 8 + 8  # 4 bits, su, sv in float32, tlut, rcp and tp_rank
    assert (layer["code"], layer["bits"], layer["shape"], layer["bytes"]) == ("hyb", 4, [32, 192], stored)


def test_shards_and_resuming(written, tmp_path, monkeypatch):
    folder, state = written("hyb-chunks")
    monkeypatch.setattr(module, "SHARD_BYTES", 60_000)
    real, written_now = module.write_shard, []

    def write(path, tensors):
        if len(written_now) == 2:
            raise KeyboardInterrupt
        written_now.append(path.name)
        real(path, tensors)

    monkeypatch.setattr(module, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty: .* --resume"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="no unfinished conversion of this source"):
        convert(written("hyb")[0], tmp_path / "out", resume=True)
    first = (tmp_path / "out" / written_now[0]).stat().st_mtime_ns
    monkeypatch.setattr(module, "write_shard", real)
    done = convert(folder, tmp_path / "out", resume=True)
    assert done["shards"] > 2 and (tmp_path / "out" / written_now[0]).stat().st_mtime_ns == first
    assert_dense(tmp_path / "out", state)
    assert not (tmp_path / "out" / module.STATE).exists()
    with pytest.raises(ValueError, match="is finished"):
        convert(folder, tmp_path / "out", resume=True)


def test_the_tokenizer_is_asked_for(written, tiny_model, tiny_text, tmp_path, capsys):
    source = shutil.copytree(written("e8p-2")[0], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": "meta-llama/Llama-2-7b-hf"}))
    with pytest.raises(ValueError, match="no tokenizer .it comes from 'meta-llama/Llama-2-7b-hf'.* --tokenizer"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert cli.main(["evaluate", str(source), "--text", str(tiny_text), "--sequence-length", "64"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no tokenizer: give a folder"):
        convert(source, tmp_path / "out", str(source))
    convert(source, tmp_path / "out", str(tiny_model()))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_result_that_differs_is_refused(written, tmp_path, monkeypatch):
    folder, real = written("hyb")[0], module.write_shard

    def write(path, tensors):
        damaged = {name: one.roll(1) if name.endswith("packed") else one for name, one in tensors.items()}
        real(path, damaged)

    monkeypatch.setattr(module, "write_shard", write)
    with pytest.raises(ValueError, match=r"is not the same in .* report this, and do not use"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_has_no_kernels_is_said(written, tmp_path, caplog):
    for kind in ("hyb", "1mad", "lut-12"):
        convert(written(kind)[0], tmp_path / kind)
    assert not caplog.records
    convert(written("hyb-1")[0], tmp_path / "hyb-1")
    assert "on GPUs with Triton alone" in caplog.text


def test_our_own_and_other_folders_are_refused(written, tiny_model, tmp_path):
    convert(written("e8p-2")[0], tmp_path / "out")
    with pytest.raises(ValueError, match="is a checkpoint of quip_vllm already"):
        convert(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match="has no quantization_config: this is not a quantized checkpoint"):
        convert(tiny_model(), tmp_path / "again")


def test_command(written, tiny_text, tmp_path, capsys, monkeypatch):
    folder, _ = written("e8p-4")
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--evaluate", str(tiny_text)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"wrote {tmp_path / 'out'}: 8 quantized layers in 1 files")
    length = ["--text", str(tiny_text), "--sequence-length", "256", "--windows", "1"]
    assert cli.main(["evaluate", str(folder), *length, "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["results"][0]
    assert f"tokens: {figures['perplexity']:.4f}" in said.out
    assert "perplexity of one window of 256 tokens: " in said.out and "WARNING" not in said.err
    monkeypatch.setattr(cli, "SUSPICIOUS", 1.0)
    assert cli.main(["convert", str(folder), str(tmp_path / "other"), "--evaluate", str(tiny_text)]) == 0
    assert "WARNING: that is no language model's" in capsys.readouterr().err
    assert cli.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "is finished" in capsys.readouterr().err


def changed(folder, tmp_path, tensors=None, config=None):
    """A copy of a folder after changes to its tensors, its config.json or the quip_params there."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    if tensors:
        state = load_file(copy / "model.safetensors")
        tensors(state)
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    if config:
        model = json.loads((copy / "config.json").read_text())
        config(model, model["quip_params"])
        (copy / "config.json").write_text(json.dumps(model))
    return copy


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("e8p-2", lambda m, p: p.update(lora_rank=64), "quip_params has lora_rank 64"),
        ("e8p-2", lambda m, p: p.update(outlier_channel_split=True), "quip_params has outlier_channel_split True"),
        ("e8p-2", lambda m, p: p.update(pack_out=True), "quip_params has pack_out True"),
        ("e8p-2", lambda m, p: p.update(something_new=[1]), "quip_params has something_new"),
        ("e8p-2", lambda m, p: p.update(codebook="D4"), "codebook is 'D4': QuIP#'s E8P12, "),
        ("e8p-2", lambda m, p: p.update(codebook=["E8P12"]), "codebook is "),
        ("e8p-2", lambda m, p: p.update(codebook_version=0), "codebook_version is 0: .* before 2024"),
        ("e8p-4", lambda m, p: p.update(resid_scale_override=3.2), "resid_scale_override is 3.2: .* 3.45 only"),
        ("e8p-4", lambda m, p: p.update(resid_scale_override="x"), "resid_scale_override is 'x'"),
        ("e8p-4", lambda m, p: p.update(rescale_WH=False), "has tensors .*scaleWH"),
        ("e8p-2", lambda m, p: p.update(codebook="E8P12RVQ4B"), "has Qidxs torch.int64"),
        ("e8p-2", lambda m, p: m.update(model_type="opt"), "model_type is 'opt'"),
        ("e8p-2", lambda m, p: m.update(hidden_size=10**18), "which have to be|in place of|multiples"),
        ("e8p-2", lambda m, p: m.update(num_hidden_layers=10**18), "num_hidden_layers 1000000000000000000"),
        ("e8p-2", lambda m, p: m.update(num_hidden_layers=1), "num_hidden_layers 1, but"),
        (
            "hyb",
            lambda m, p: p.update(decode_mode="3mad"),
            "decode_mode is '3mad': QTIP's quantlut_sym, .*2mad are read",
        ),
        (
            "lut",
            lambda m, p: p.update(L=17, tlut_bits=17),
            "quip_params has L 17: with decode_mode lut 1 to 16 is read",
        ),
        ("lut", lambda m, p: p.update(L=12), "quip_params has tlut_bits 16: with decode_mode lut 12 is read"),
        ("lut", lambda m, p: p.update(L=12, tlut_bits=12), "has tlut torch.float16"),
        ("lut", lambda m, p: p.update(V=3), "quip_params has V 3: with decode_mode lut 1 or 2 is read"),
        ("lut", lambda m, p: p.update(L=3, tlut_bits=3), "K 4, with V 1 more bits per step than the 3 of a state"),
        ("quantlut", lambda m, p: p.update(tlut_bits=True), "has tlut_bits True: with decode_mode quantlut 1 to 16"),
        ("2mad", lambda m, p: p.update(V=2), "quip_params has V 2: with decode_mode 2mad 1 is read"),
        ("hyb", lambda m, p: p.update(decode_mode="1mad"), "quip_params has V 2: with decode_mode 1mad 1 is read"),
        ("hyb", lambda m, p: p.update(L=12), "quip_params has L 12"),
        ("hyb", lambda m, p: p.update(td_x=8), "quip_params has td_x 8"),
        ("hyb", lambda m, p: p.update(tlut_bits=8), "quip_params has tlut_bits 8"),
        ("hyb", lambda m, p: p.update(codebook_version=1), "quip_params has codebook_version 1"),
        ("hyb", lambda m, p: p.update(K=9), "bits is 9"),
        ("hyb", lambda m, p: p.update(K="2"), "bits is '2'"),
        ("hyb", lambda m, p: p.update(K=3), "has trellis torch.int16"),
        ("hyb", lambda m, p: p.update(K_v_proj=None), "v_proj has trellis torch.int16"),
        ("hyb", lambda m, p: m.update(intermediate_size=96), "but config.json gives it"),
    ],
)
def test_a_config_that_is_not_read_is_refused_before_data_is_read(written, tmp_path, kind, change, words, monkeypatch):
    folder = changed(written(kind)[0], tmp_path, config=change)
    monkeypatch.setattr("quip_vllm.checkpoint.store.CheckpointReader.read", scalars_only)
    with pytest.raises(ValueError, match=words):
        read_config(folder)


def scalars_only(self, names):
    from safetensors import safe_open

    found = {}
    for name in names:
        assert name.endswith((".rcp", ".tp_rank")), name
        with safe_open(self.file_of[name], framework="pt") as file:
            found[name] = file.get_tensor(name)
    return found


QKV, Q = "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("e8p-2", lambda t: t.pop(f"{QKV}.SU"), f"{QKV} has tensors "),
        ("e8p-2", lambda t: t.pop(f"{QKV}.fuse_scales"), f"{QKV} has tensors "),
        ("e8p-2", lambda t: t.update({f"{QKV}.A": torch.ones(4)}), f"{QKV} has tensors A, "),
        ("e8p-2", lambda t: t.update({f"{QKV}.bias": torch.ones(4)}), f"{QKV} has tensors Qidxs, .*bias"),
        ("e8p-2", lambda t: t.update({f"{QKV}.SV": t[f"{QKV}.SV"].to(torch.int16)}), "has SV torch.int16"),
        ("e8p-2", lambda t: t.update({f"{QKV}.Qidxs": t[f"{QKV}.Qidxs"].int()}), "has Qidxs torch.int32"),
        ("e8p-2", lambda t: t.update({f"{Q}.weight": torch.ones(64, 192)}), f"{Q} is in the files twice"),
        (
            "e8p-2",
            lambda t: [t.pop(name) for name in list(t) if name.startswith(QKV)],
            "q_proj is in the files neither quantized nor dense",
        ),
        ("hyb", lambda t: t.pop(f"{Q}.tlut"), f"{Q} has tensors "),
        ("lut", lambda t: t.pop(f"{Q}.tlut"), f"{Q} has tensors "),
        ("2mad", lambda t: t.update({f"{Q}.tlut": torch.ones(512, 1)}), f"{Q} has tensors .*tlut"),
        ("hyb", lambda t: t.update({f"{Q}.rcp": torch.tensor(3)}), "rcp 3, which must be 0, 1 or 2"),
        ("hyb-chunks", lambda t: t.update({f"{Q}.tp_rank": torch.tensor(0)}), "tp_rank 0, which cuts its 64"),
        ("hyb-chunks", lambda t: t.update({f"{Q}.tp_rank": torch.tensor(7)}), "tp_rank 7, which cuts its 64"),
        ("hyb", lambda t: t.update({f"{Q}.tlut": t[f"{Q}.tlut"][:256].contiguous()}), "has tlut torch.float16"),
    ],
)
def test_damaged_tensors_are_named(written, tmp_path, kind, change, words):
    with pytest.raises(ValueError, match=words):
        read_config(changed(written(kind)[0], tmp_path, tensors=change))


def test_another_codebook_id_is_refused(written, tmp_path):
    def change(tensors):
        tensors[f"{QKV}.codebook_id"] = torch.tensor(17)

    folder = changed(written("e8p-2")[0], tmp_path, tensors=change)
    with pytest.raises(ValueError, match=f"{QKV} has codebook_id 17 in place of 7"):
        load_model(str(folder))


def test_numbers_that_are_none_are_refused(written, tmp_path):
    def change(tensors):
        tensors[f"{Q}.SV"][5] = float("nan")

    folder = changed(written("hyb")[0], tmp_path, tensors=change)
    with pytest.raises(ValueError, match=f"{Q}.*sv holds a NaN"):
        convert(folder, tmp_path / "out")


LEAVES = ("Qidxs", "SU", "SV", "fuse_scales", "trellis", "tlut", "rcp", "tp_rank")


def mutate(draw, header, raw, model):
    """One random change: see mutated_files."""
    names = [name for name in header if name.rpartition(".")[2] in LEAVES]
    name, kind = draw.choice(names), draw.randrange(7)
    one, body = header[name], raw
    if kind == 0:
        body = raw[: draw.randrange(len(raw))]
    elif kind == 1:
        floating = one["dtype"].startswith("F")
        one["dtype"] = draw.choice(["I16", "I32", "U8", "XX", "BOOL"] if floating else ["F32", "BF16", "F16", "XX"])
    elif kind == 2:
        one["shape"] = draw.choice([[0], [1, 1, 1], [10**12, 2], [*one["shape"], 2], [-1], [7]])
    elif kind == 3:
        layer = name.rpartition(".")[0]
        del header[draw.choice([f"{layer}.SU", f"{layer}.SV"])]
    elif kind == 4:
        one["data_offsets"] = [draw.randrange(2**40), draw.randrange(2**40)]
    elif kind == 5:
        key = draw.choice(["hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_hidden_layers"])
        model[key] = draw.choice([0, -1, 10**18, 1.5, "64", [], {}, 7 * 128])
    else:
        key = draw.choice(["codebook", "K", "L", "V", "td_x", "decode_mode", "codebook_version", "lora_rank"])
        if key not in model["quip_params"]:
            key = "lora_rank"
        model["quip_params"][key] = draw.choice([-1, 10**18, 7.5, "64", ["x"], {"a": 1}])
    return body


@pytest.mark.parametrize("kind", ["e8p-2", "e8p-3", "hyb-chunks", "1mad", "2mad", "lut-12", "quantlut"])
def test_mutated_files_end_in_a_sentence(written, tmp_path, kind):
    mutated_files.end_in_a_sentence(written(kind)[0], tmp_path, kind, mutate)
