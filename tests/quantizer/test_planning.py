# SPDX-License-Identifier: Apache-2.0
"""From a target to a plan and from a plan to a checkpoint: budgets, what a person edits, the guard, resuming."""

import json

import pytest

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.cli import main
from quip_vllm.evaluation.report import evaluate
from quip_vllm.quantizer import planning, run
from quip_vllm.quantizer.plan import make_plan
from quip_vllm.quantizer.plan_file import format_plan, most_common, read_plan
from quip_vllm.quantizer.planning import Target, make_plan_file
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.source.model import LayeredModel

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def plan(tiny_model, make_settings, tmp_path):
    """plan(Target arguments, architecture, ...settings) -> the plan as JSON."""

    def plan(*target, architecture="Llama", config=None, **changes):
        settings = make_settings(tiny_model(architecture, **(config or {})), **changes)
        return make_plan_file(settings, Target(*target), tmp_path / "hidden")

    return plan


def bits_of(made):
    return {name: one["bits"] for name, one in made["layers"].items()}


def test_a_mean_of_bits(plan, monkeypatch):
    made = plan(2.5)
    assert 2.45 < made["bits"] <= 2.5 and made["target"] == {"bits": 2.5}
    assert set(bits_of(made).values()) <= {2, 3, 4} and len(made["layers"]) == 14
    assert 0 < made["loss"] < made["even"]["loss"] and made["even"]["kl_with_noise"] > 0
    chosen = [row["loss"] for one in made["layers"].values() for row in one["losses"] if row["bits"] == one["bits"]]
    assert sum(chosen) == pytest.approx(made["loss"], rel=1e-4)
    assert plan(2.5) == made
    monkeypatch.setattr(planning, "noisy_divergences", lambda *_: (0.2, 0.1))
    even = plan(2.5)
    assert even["even"]["chosen"] and even["loss"] == even["even"]["loss"]
    layers = [{bits for name, bits in bits_of(even).items() if f"layers.{i}." in name} for i in range(2)]
    assert layers == [{2}, {3}] and "so the bits are its own" in format_plan(even)


def test_what_a_user_says_stays(plan):
    made = plan(3.0, ignore=("0.mlp",), overrides=(("down_proj", 4), ("1.self_attn.q", 2)), lm_head=4)
    bits = bits_of(made)
    assert bits[DOWN] == 4 and bits["model.layers.1.self_attn.q_proj"] == 2 and bits["model.embed_tokens"] == 4
    assert {bits[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down")} == {None}
    assert 2.8 < made["bits"] <= 3.0


def test_codes_follow_the_bits(plan):
    made = plan(1.75, code="1mad", bits=4)
    assert {(one["code"], one["bits"]) for one in made["layers"].values()} <= {
        ("hyb", 1),
        ("hyb", 2),
        ("1mad", 3),
        ("1mad", 4),
    }
    only = plan(1.75, None, "1mad", code="1mad", bits=4)
    assert {one["code"] for one in only["layers"].values()} == {"1mad"}


def test_a_mean_of_bits_of_the_grid(plan, tiny_model, make_settings, tiny_text, tmp_path):
    made = plan(4.5, code="grid", bits=4)
    assert 4.45 < made["bits"] <= 4.5 and {one["code"] for one in made["layers"].values()} == {"grid"}
    rows = made["layers"][DOWN]["losses"]
    assert [row["bits"] for row in rows] == [3, 4, 5, 6, 7]
    assert all(2 < one["loss"] / other["loss"] < 8 for one, other in zip(rows, rows[1:], strict=False))
    plain = plan(4.5, code="grid", bits=4, rounding="nearest")
    assert all(one["loss"] < two["loss"] for one, two in zip(rows, plain["layers"][DOWN]["losses"], strict=True))
    quantize(make_settings(tiny_model(), code="grid", bits=4).with_plan(tuple(read(made, tmp_path))), tmp_path / "out")
    assert made["bytes"] == pytest.approx((tmp_path / "out" / "model.safetensors").stat().st_size, rel=0.05)
    (figures,) = evaluate([str(tmp_path / "out")], [str(tiny_text)], str(tiny_model()), 48, 4)["results"]
    assert 0 < figures["kl_divergence"] < 0.02


@pytest.mark.parametrize(("architecture", "limits"), [("Llama", (48_000, 54_000)), ("Mistral", (57_000, 64_000))])
def test_a_size(plan, tiny_model, make_settings, tmp_path, architecture, limits):
    """Of a tied model, and of one whose embedding has bits of its own; where there is room, both keep their weight."""
    for size in (*limits, 10**9):
        made = plan(None, size, architecture=architecture)
        settings = make_settings(tiny_model(architecture)).with_plan(tuple(read(made, tmp_path)))
        quantize(settings, tmp_path / f"{size}")
        found = (tmp_path / f"{size}" / "model.safetensors").stat().st_size
        assert found <= size and found == pytest.approx(made["bytes"], rel=0.05)
        assert found > 0.9 * size or size == 10**9
        assert (bits_of(made)["model.embed_tokens"] is None) == (size == 10**9)
    assert made["loss"] > 0


def read(made, folder):
    write_json(folder / "made.json", made)
    return read_plan(folder / "made.json")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((1.9,), "--bits is 1.9, and quip_sharp makes 2 to 4 bits per weight, --override excepted: give bits between"),
        ((4.5,), "--bits is 4.5, and quip_sharp makes 2 to 4 bits per weight"),
        ((None, 20_000), "--size is 20,000 bytes, and the smallest formats make [2-9].,...: give at least that"),
    ],
)
def test_targets_out_of_reach(plan, target, message):
    with pytest.raises(ValueError, match=message):
        plan(*target)


def test_a_target_has_a_range():
    for bits in (1.4, 8.1):
        with pytest.raises(ValueError, match=f"--bits is {bits}: give bits per weight from 1.5 to 8"):
            Target(bits)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (None, "has no object layers: make a plan with `quip-vllm plan"),
        ({}, "has no object layers"),
        ({DOWN: 3}, "layers.model.layers.1.mlp.down_proj is 3: give an object with code and bits"),
        ({DOWN: {"code": "e8p"}}, "is {'code': 'e8p'}: give an object with code and bits; bits null keeps the weight"),
        ({DOWN: {"code": "e8p", "bits": 5}}, "down_proj: bits is 5: quip_sharp with code e8p has 2, 3, 4"),
        ({DOWN: {"code": "e9p", "bits": 2}}, "down_proj: code is 'e9p': it must be one of"),
        ({DOWN: {"code": "e8p", "bits": "2"}}, "down_proj: bits is '2': "),
    ],
)
def test_damaged_plans(tmp_path, layers, message):
    write_json(tmp_path / "plan.json", {"layers": layers})
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.json")


def test_plans_of_another_model(tiny_model, make_settings):
    source = LayeredModel(tiny_model())
    names = [name for index in range(2) for name in source.linears(index)]
    whole = tuple((name, LayerFormat("e8p", 3)) for name in names)
    settings = make_settings(source.folder)
    assert {spec.bits for spec in make_plan(settings.with_plan(whole), source).specs.values()} == {3}
    with pytest.raises(ValueError, match="the plan does not name model.layers.1.mlp.down_proj: give its code and bits"):
        make_plan(settings.with_plan(whole[:-1]), source)
    with pytest.raises(ValueError, match="the plan names model.layers.2.q_proj, which .* has not: take it out"):
        make_plan(settings.with_plan((*whole, ("model.layers.2.q_proj", None))), source)
    with pytest.raises(ValueError, match="the plan keeps the weight of every layer"):
        most_common(tuple((name, None) for name in names))
    with pytest.raises(ValueError, match="a plan says the bits of every layer: leave --ignore"):
        make_settings(source.folder, plan=whole, lm_head=4)


def test_command_line(tiny_model, tiny_text, tmp_path, capsys):
    """A plan is made, drawn, edited, and quantized by."""
    model = str(tiny_model("Mistral"))
    text = ["--calibration", str(tiny_text), "--sequences", "8", "--sequence-length", "48", "--tune", "none"]
    target = ["--method", "quip_sharp", "--bits", "2.5", *text]
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert main(["plan", model, *target, "--out", str(file), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:2] == ["q_proj", "k_proj"] and len(said) == 5 and picture.stat().st_size > 10_000
    made = read_json(file)
    assert [int(word) for word in said[2].split()[1:]] == list(bits_of(made).values())[7:]
    made["layers"][DOWN] |= {"code": "1mad", "bits": 8}
    made["layers"]["lm_head"] = {"code": "e8p", "bits": 4}
    file.write_text(json.dumps(made))
    assert main(["quantize", model, str(tmp_path / "edited"), "--plan", str(file), *text]) == 0
    found = {layer["name"]: layer["bits"] for layer in inspect(tmp_path / "edited")["layers"]}
    assert found == bits_of(made) and found[DOWN] == 8 and found["lm_head"] == 4
    assert main(["quantize", model, str(tmp_path / "x"), "--plan", str(file), "--bits", "2"]) == 2
    assert "--plan says code and bits of every layer: leave --bits away" in capsys.readouterr().err
    for words in (["--bits", "2.x"], ["--size", "1XB"], [], ["--bits", "2", "--size", "1GB"]):
        assert main(["plan", model, "--method", "qtip", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "--bits is 2.x: give a number" in told[0] and "--size is 1XB: give a number and a unit" in told[1]
    assert all("give --method, and either --bits or --size" in line for line in told[2:])


def test_a_target_is_resumed(tiny_model, make_settings, tmp_path, monkeypatch):
    settings, original, calls = make_settings(tiny_model()), run.quantize_group, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 6:
            raise OSError("stopped")
        return original(*args)

    monkeypatch.setattr(run, "quantize_group", failing)
    with pytest.raises(OSError, match="stopped"):
        quantize(settings, tmp_path / "out", target=Target(2.5))
    with pytest.raises(ValueError, match="was begun with the target .*2.5.*: give the same or a new folder"):
        quantize(settings, tmp_path / "out", resume=True, target=Target(2.75))
    monkeypatch.setattr(run, "make_plan_file", lambda *_: pytest.fail("the plan is there"))
    quantize(settings, tmp_path / "out", resume=True, target=Target(2.5))
    monkeypatch.undo()
    quantize(settings, tmp_path / "whole", target=Target(2.5))
    for name in ("model.safetensors", "config.json", "quantization_plan.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="is not empty: give a new folder"):
        quantize(settings, tmp_path / "whole", target=Target(2.5))
