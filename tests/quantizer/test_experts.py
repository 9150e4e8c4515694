# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: each expert with the Hessian of the tokens that are routed to it, and all of a run with them."""

import logging
from itertools import product
from types import SimpleNamespace

import numerics
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.layers import read_layers
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import check_complete, load_model
from quip_vllm.nn.experts import Experts, layout_of, unstack
from quip_vllm.ops import dequantize
from quip_vllm.quantizer import checks, run
from quip_vllm.quantizer.curvature.collector import Collector
from quip_vllm.quantizer.curvature.inputs import Inputs, fill_up
from quip_vllm.quantizer.plan import make_plan
from quip_vllm.quantizer.plan_file import format_plan, read_plan
from quip_vllm.quantizer.planning import Target, make_plan_file
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.source.mixture import Mixture
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer

TOKENS = torch.randint(0, 256, (6, 40), generator=torch.Generator().manual_seed(0))
IGNORED = {name: ("kv_b_proj",) for name in ("DeepseekV2", "DeepseekV3")}
"""vLLM needs their dense weight."""


def in_model(name, architecture):
    """The name in transformers' model of what has a name in its files."""
    renamed = {"Mixtral": ("block_sparse_moe", "mlp"), "NemotronH": ("backbone", "model")}
    return name.replace(*renamed.get(architecture, ("", "")))


def stacks(model):
    """Path -> module, of transformers' stacked experts."""
    return {path: one for path, one in model.named_modules() if path.endswith(".experts")}


@torch.no_grad()
@pytest.mark.parametrize("architecture", tiny_models.EXPERTS)
def test_hessians_are_those_of_the_tokens_routed(tiny_model, architecture):
    folder = tiny_model(architecture, dtype="float32")
    whole, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    for path, module in stacks(whole).items():
        module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args}))
    whole(TOKENS)
    path, (x, *routing) = list(seen.items())[-1]
    stack, source = whole.get_submodule(path), LayeredModel(folder)
    hidden, calls = source.first_hidden_states(TOKENS, 2)
    last = len(source.layers) - 1
    for index in range(last):
        with source.layer(index) as layer:
            hidden = [run_layer(layer, one, calls[index]) for one in hidden]
    (mixture,) = source.mixtures(last)
    linears = {name: one for name, one in source.linears(last).items() if name in mixture.linears}
    collector = Collector(linears, {}, dict.fromkeys(mixture.linears, mixture.module))
    with source.layer(last) as layer:
        for one in hidden:
            run_layer(layer, one, calls[last])
    groups = {tuple(group.names): group for group in collector.close()}
    assert len(groups) == 8 and set(groups) == {tuple(names) for readers in mixture.readers for names in readers}
    assert "w1" in mixture.linears[0] if architecture == "Mixtral" else in_model(mixture.name, architecture) == path
    for expert, (first, second) in enumerate(zip(*mixture.readers, strict=True)):
        if routing:
            rows = x[(routing[0] == expert).any(-1)].double()
        else:  # a run of rows for each expert, of zeros where it is not chosen
            rows = (own := x.chunk(4)[expert])[own.any(-1)].double()
        outer = stack.get_parameter(mixture.module.stacks[0])[expert].double()
        outer = rows @ (outer if mixture.module.transposed else outer.T)
        if architecture == "Llama4Text":
            inner = torch.nn.functional.silu(outer[:, :32]) * outer[:, 32:]
        elif architecture == "NemotronH":
            inner = outer.relu() ** 2
        else:
            inner = stack._apply_gate(outer + stack.gate_up_proj_bias[expert] if stack.has_bias else outer)
        for names, read in ((first, rows), (second, inner)):
            group = groups[tuple(names)]
            assert group.tokens == len(rows) > 0
            assert numerics.relative(group.hessian, read.T @ read) < numerics.FLOAT32_HESSIAN


class Routed(nn.Module):
    """A layer whose input says which experts a token goes to."""

    def __init__(self):
        super().__init__()
        self.experts = Experts(stack := Stack(), layout_of(stack))
        for linear in self.experts.modules():
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(torch.randn(linear.weight.shape))

    def forward(self, x):
        chosen = x[:, :3].topk(2).indices
        return self.experts(x, chosen, x.gather(1, chosen))


class Stack(nn.Module):
    """As transformers has them: 3 experts, 8 inputs, 4 between."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(3, 8, 4))
        self.has_gate = self.is_concatenated = True
        self.has_bias = self.is_transposed = False

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return gate.sigmoid() * up


@torch.no_grad()
def test_drift_is_that_of_the_tokens_that_both_passes_route_alike():
    model = Routed()
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    collector = Collector(linears, {}, dict.fromkeys(linears, model.experts))
    pairs = [(x, x + 0.5 * torch.randn(7, 8)) for x in torch.randn(3, 7, 8)]
    for original, x in pairs:
        with collector.original():
            model(original)
        with collector.inputs():
            model(x)
    groups = {group.names[-1]: group for group in collector.close()}
    moved = 0
    for expert in range(3):
        expected, squares = torch.zeros(8, 8), torch.zeros(8, 8)
        for original, x in pairs:
            there, here = ((one[:, :3].topk(2).indices == expert).any(-1) for one in (original, x))
            moved += int((there != here).sum())
            expected += (original - x)[there & here].T @ x[there & here]
            squares += x[here].T @ x[here]
        group = groups[f"experts.{expert}.up_proj"]
        assert numerics.relative(group.hessian, squares) < numerics.FLOAT32_SUMS
        assert numerics.relative(group.drift.difference, expected) < numerics.FLOAT32_SUMS
        gate, up, down = (linears[f"experts.{expert}.{leaf}_proj"] for leaf in ("gate", "up", "down"))
        inner = [[gate(one).sigmoid() * up(one) for one in pair] for pair in pairs]
        found = groups[f"experts.{expert}.down_proj"].drift.difference
        alike = [torch.stack([(x[:, :3].topk(2).indices == expert).any(-1) for x in pair]).all(0) for pair in pairs]
        expected = sum((a - b)[one].T @ b[one] for (a, b), one in zip(inner, alike, strict=True))
        assert numerics.relative(found, expected) < numerics.FLOAT32_SUMS
    assert moved > 3


def test_few_tokens_are_filled_up_from_the_mean_over_experts():
    names = [[f"experts.{i}.gate_proj", f"experts.{i}.up_proj"] for i in range(3)]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 4, generator=draw, dtype=torch.float64) for count in (9, 3)]
    groups = [Inputs(of, x.T @ x, len(x)) for of, x in zip(names, rows, strict=False)]
    kept = [group.hessian.clone() for group in groups]
    other = Inputs(["attention"], torch.ones(7, 7, dtype=torch.float64), 1)
    found = fill_up([other, *groups], [Mixture("experts", Experts(stack := Stack(), layout_of(stack)), (names, []))])
    assert [group.names for group in found] == [["attention"], *names]
    assert [(group.tokens, group.borrowed) for group in found] == [(1, 0), (9, 0), (3, 1), (0, 4)]
    mean = (kept[0] + kept[1]) / 12
    for group, expected in zip(found[1:], (kept[0], kept[1] + mean, 4 * mean), strict=True):
        torch.testing.assert_close(group.hessian, expected)
    assert torch.equal(other.hessian, torch.ones(7, 7, dtype=torch.float64))


@torch.no_grad()
def test_what_is_no_usual_stack_stays():
    for key, value in (("has_bias", True), ("has_gate", False)):
        model = nn.ModuleDict({"experts": Stack()})
        setattr(model["experts"], key, value)
        unstack(model)
        assert type(model["experts"]) is Stack
    model = nn.ModuleDict({"experts": Stack()})
    unstack(model)
    assert type(model["experts"]) is Experts and len(model["experts"]) == 3


@torch.no_grad()
@pytest.mark.parametrize("architecture", tiny_models.EXPERTS)
def test_a_run(tiny_model, make_settings, architecture, tmp_path):
    """The dequantized model is transformers' own with each expert's weight replaced."""
    folder = tiny_model(architecture, dtype="float32")
    report = quantize(make_settings(folder, code="1mad", ignore=IGNORED.get(architecture, ())), tmp_path)
    check_complete(tmp_path)
    found = load_model(str(tmp_path))(TOKENS).logits
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    original = model(TOKENS).logits
    state, seen = model.state_dict(), 0
    for name, spec, tensors in read_layers(tmp_path):
        path = in_model(name, architecture).split(".experts.")
        dense = dequantize(spec, tensors)
        if len(path) == 1:
            state[f"{path[0]}.weight"].copy_(dense)
            continue
        (number, leaf), seen = path[1].split("."), seen + 1
        first = "up_proj" if architecture == "NemotronH" else "gate_up_proj"
        stack = state[f"{path[0]}.experts.{'down_proj' if leaf in ('down_proj', 'w2') else first}"]
        stack = stack[int(number)].T if architecture in ("GptOss", "Llama4Text") else stack[int(number)]
        halves = slice(0, len(stack) // 2), slice(len(stack) // 2, None)
        half = dict(zip(("gate_proj", "up_proj", "w1", "w3"), halves * 2, strict=True))
        half = {} if architecture == "NemotronH" else half
        stack[half.get(leaf, slice(None))] = dense
    assert seen == (8 if architecture in ("GptOss", "NemotronH") else 12) * len(stacks(model)) > 0
    tolerance = {"rtol": numerics.FLOAT32_LAYERS, "atol": numerics.FLOAT32_LAYERS}
    torch.testing.assert_close(found, model(TOKENS).logits, **tolerance)
    assert 0 < numerics.relative(found, original) < 0.9
    config = CheckpointConfig.from_dict(read_json(tmp_path / "config.json")["quantization_config"])
    router = {"GptOss": "router", "GraniteMoe": "router.layer", "Llama4Text": "router"}.get(architecture, "gate")
    routers = [path.replace("experts", router) for path in stacks(model)]
    assert set(routers) <= {in_model(name, architecture) for name in config.modules_to_not_convert}
    padded = ["backbone.layers.0.mixer.in_proj"] if architecture == "NemotronH" else []
    assert list(config.layers) == padded
    assert not [name for name in config.modules_to_not_convert if ".experts" in name]
    inside = [entry for entry in report["layers"] if ".experts." in entry["name"]]
    assert len(inside) == seen == len([one for one in inspect(tmp_path)["layers"] if ".experts." in one["name"]])
    for entry in inside:
        assert entry["borrowed_tokens"] == max(0, entry["shape"][1] - entry["tokens"])
        assert entry["proxy_loss"] < 0.15


@pytest.fixture
def idle(tmp_path):
    """A model whose first layer never chooses its last expert."""
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_models.save_model(folder, "Qwen3Moe", num_experts=5)
    tensors = load_file(folder / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate.weight"].zero_()
    gate[:, 0] = torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0])  # two of the others are always above the last
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_without_tokens_are_told(idle, make_settings, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report = quantize(make_settings(idle, sequences=2, tune="refit", two_sided=True), tmp_path / "out")
    tokens = {entry["name"]: (entry["tokens"], entry["borrowed_tokens"]) for entry in report["layers"]}
    begin = "model.layers.0.mlp.experts.4"
    assert [tokens[f"{begin}.{leaf}_proj"] for leaf in ("gate", "up", "down")] == [(0, 64), (0, 64), (0, 32)]
    few = {name.rpartition(".")[0] for name, (_, borrowed) in tokens.items() if borrowed}
    assert begin in few and f"{len(few)} of 10 experts saw fewer tokens than they have inputs: the" in caplog.text
    load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("tune", ["blocks", "full"])
def test_experts_are_trained(tiny_model, make_settings, tmp_path, tune):
    settings = make_settings(tiny_model("Qwen2Moe"), tune=tune, two_sided=True, token_weights=1.0)
    report = quantize(settings, tmp_path)
    assert all(told["after"] < told["before"] for told in report["tuning"][-1:])
    tensors = load_file(tmp_path / "model.safetensors")
    one, other = (tensors[f"model.layers.1.mlp.experts.2.{leaf}_proj.su"] for leaf in ("gate", "up"))
    assert torch.equal(one, other) and not torch.equal(one.abs(), torch.ones_like(one))


class Killed(BaseException):
    """Nobody catches it."""


def test_a_killed_run_goes_on(tiny_model, make_settings, tmp_path, monkeypatch):
    settings = make_settings(tiny_model("Qwen3Moe"), two_sided=True, tune="full")
    quantize(settings, tmp_path / "whole")
    count, original = [0], run.quantize_group

    def dying(*args):
        count[0] += 1
        if count[0] == 15:  # of the second layer
            raise Killed
        return original(*args)

    monkeypatch.setattr(run, "quantize_group", dying)
    with pytest.raises(Killed):
        quantize(settings, tmp_path / "killed")
    quantize(settings, tmp_path / "killed", resume=True)
    assert count[0] == 15 + 10
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_too_little_memory_is_said_before(tiny_model, monkeypatch, make_settings):
    source = LayeredModel(tiny_model("Qwen3Moe"))
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(available=500_000))
    checks.check_memory(make_settings(source.folder, sequences=1), source, 1)  # 8 * 4 * (64^2 + 32^2) * 2 bytes
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(available=320_000))
    with pytest.raises(ValueError, match=r"^the Hessians of all experts of a decoder layer take about .* --no-two"):
        checks.check_memory(make_settings(source.folder, sequences=1), source, 1)
    for changes in ({"drift_correction": 0.0}, {"ignore": ("experts",)}):
        checks.check_memory(make_settings(source.folder, sequences=1, **changes), source, 1)


def test_a_plan(idle, make_settings, tmp_path):
    settings = make_settings(idle, sequences=16)
    made = make_plan_file(settings, Target(2.5), tmp_path / "hidden")
    assert 2.4 < made["bits"] <= 2.5 and len(made["layers"]) == 2 * (4 + 5 * 3)
    begin = "model.layers.{}.mlp.experts.{}.{}_proj"
    for layer, leaf in product(range(2), ("gate", "up", "down")):
        alike = [made["layers"][begin.format(layer, expert, leaf)] for expert in range(5)]
        assert len({one["bits"] for one in alike}) == 1
        assert [all(row["loss"] > 0 for row in one["losses"]) for one in alike] == [True] * 4 + [layer == 1]
    chosen = [row["loss"] for one in made["layers"].values() for row in one["losses"] if row["bits"] == one["bits"]]
    assert sum(chosen) == pytest.approx(made["loss"], rel=1e-4) and made["loss"] < made["even"]["loss"]
    assert (
        0.5 < made["loss"] / made["kl_with_noise"] < 2
    )  # two ways to the same, of which one sees other experts chosen
    write_json(tmp_path / "plan.json", made)
    quantize(settings.with_plan(read_plan(tmp_path / "plan.json")), tmp_path / "out")
    found = {layer["name"]: layer["bits"] for layer in inspect(tmp_path / "out")["layers"]}
    assert found == {name: one["bits"] for name, one in made["layers"].items()}
    assert len(format_plan(made).splitlines()[0].split()) == 7


def test_a_size(tiny_model, make_settings, tmp_path):
    settings = make_settings(tiny_model("Qwen2Moe"))
    made = make_plan_file(settings, Target(None, 125_000), tmp_path / "hidden")
    write_json(tmp_path / "plan.json", made)
    quantize(settings.with_plan(read_plan(tmp_path / "plan.json")), tmp_path / "out")
    found = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.9 * 125_000 < found <= 125_000 and found == pytest.approx(made["bytes"], rel=0.05)


def test_experts_of_a_layer_are_stored_alike(tiny_model, make_settings):
    source = LayeredModel(tiny_model("Qwen2Moe"))
    for changes in (
        {"ignore": (r"experts\.2\.",)},
        {"overrides": ((r"experts\.[01]\.down_proj", 4),)},
        {"ignore": ("down_proj",)},
    ):
        with pytest.raises(ValueError, match=r"^model.layers.0.mlp.experts has experts that differ in code and"):
            make_plan(make_settings(source.folder, **changes), source)
    plan = make_plan(make_settings(source.folder, overrides=((r"layers.1.mlp.experts\.", 4),)), source)
    assert {plan.specs[name].bits for name in source.mixtures(1)[0].linears} == {4}
    plan = make_plan(make_settings(source.folder, overrides=(("down_proj", 4),)), source)
    assert {plan.specs[name].bits for name in source.mixtures(1)[0].linears} == {2, 4}
    plan = make_plan(make_settings(source.folder, ignore=(r"layers.0.*experts\.",)), source)
    begin = "model.layers.0.mlp"
    assert set(plan.kept) == {
        "lm_head",
        *(f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate", "shared_expert_gate")),
        f"{begin}.experts",
    }
    assert f"{begin}.shared_expert.up_proj" in plan.specs and f"{begin}.experts.1.up_proj" not in plan.specs


def test_levels_of_experts(tiny_model, make_settings, tmp_path):
    """DiscQuant, whose text leaves experts out."""
    whole = {"code": "grid", "bits": 4, "rounding": "discquant", "rounding_steps": 4}
    settings = make_settings(tiny_model("Qwen3Moe"), **whole, sequences=1, sequence_length=1)
    report = quantize(settings, tmp_path)
    assert sum(entry["tokens"] == 0 for entry in report["layers"]) == 2 * 2 * 3
    load_model(str(tmp_path))


def test_files_that_stack_experts(tiny_model, make_settings, tmp_path):
    tensors = load_file(tiny_model("Qwen3Moe") / "model.safetensors")
    name = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    for layer in range(2):
        of = [[tensors.pop(name.format(layer, i, leaf)) for i in range(4)] for leaf in ("gate", "up", "down")]
        gate, up, down = map(torch.stack, of)
        tensors |= {f"model.layers.{layer}.mlp.experts.down_proj": down}
        tensors |= {f"model.layers.{layer}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1)}
    folder = tiny_models.save_model(tmp_path, "Qwen3Moe")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for model, out in ((folder, "one"), (tiny_model("Qwen3Moe"), "other")):
        quantize(make_settings(model, tune="refit"), tmp_path / out)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.experts cannot keep its weights, because"):
        make_plan(make_settings(folder, ignore=("layers.0.*experts",)), LayeredModel(folder))
    for key in ("gate_up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.experts.{key}"] = tensors[f"model.layers.0.mlp.experts.{key}"][:3].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds model.layers.0.mlp.experts.*: only models whose files have a matrix"):
        LayeredModel(folder)
