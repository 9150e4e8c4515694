# SPDX-License-Identifier: Apache-2.0
"""DiscQuant: gradients at the levels, neighbours only, a lower divergence than nearest rounding, resumed runs."""

import shutil

import pytest
import torch

from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.evaluation.report import evaluate
from quip_vllm.formats.grid import GRID
from quip_vllm.quantizer import checks, discquant, run
from quip_vllm.quantizer.discquant import Levels, _Model
from quip_vllm.quantizer.plan import make_plan
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.settings import DISCQUANT, NEAREST
from quip_vllm.quantizer.source.model import LayeredModel

TOKENS = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(0)).split(4)


@pytest.fixture
def made(tiny_model, make_settings, tmp_path):
    """made(...settings): the model between its levels, its plan, its settings."""

    @torch.no_grad()
    def made(**changes):
        folder = tiny_model(dtype="float32")
        settings = make_settings(folder, code="grid", bits=3, rounding=DISCQUANT, **changes)
        source = LayeredModel(folder)
        specs = make_plan(settings, source).specs
        return _Model(source, specs, TOKENS, settings, tmp_path / "inputs"), source, specs, settings

    return made


@torch.no_grad()
def test_a_layer_lies_between_its_neighbours(made):
    model, source, specs, settings = made()
    for linears in model.linears:
        for name, one in linears.items():
            weight = source.reader.read([f"{name}.weight"])[f"{name}.weight"]
            one.x.copy_((1 - one.slope) / 2)  # at y
            middle = one.dense()
            assert (middle - weight).norm() < 0.25 * weight.norm()  # what lies beyond the ends
            lower, upper = (one.x.fill_(x) is None or one.dense() for x in (0, 1))
            assert 0.2 < float((upper - lower).norm() / weight.norm()) < 2
            assert one.slope.abs().max() <= 1
            one.x.copy_(torch.arange(one.x.numel()).view_as(one.x) % 2)
            assert torch.equal(one.numbers() - one._lower, one.x.to(torch.uint8))


@torch.no_grad()
def test_gradients_of_the_whole_model(made):
    """Against differences of the divergence along a random direction in single layers."""
    model, *_ = made()
    model._gradients(0)
    draw = torch.Generator().manual_seed(1)
    for linears in model.linears:
        for one in list(linears.values())[::3]:
            direction = torch.randn(one.x.shape, generator=draw)
            slope = float((one.gradient * direction).sum())
            kept, found = one.x.clone(), []
            for step in (-0.02, 0.02):
                one.x.copy_(kept + step * direction)
                found.append(model._gradients(0))
            one.x.copy_(kept)
            assert (found[1] - found[0]) / 0.04 == pytest.approx(slope, rel=0.05, abs=2e-5)
            model._gradients(0)


@torch.no_grad()
def test_without_a_pull_it_is_nearest_rounding(made, monkeypatch):
    monkeypatch.setattr(discquant, "PULL", 0.0)
    model, source, _, settings = made(rounding_steps=40)
    model.train(settings)
    for linears in model.linears:
        for one in linears.values():
            clear = one.slope.abs() > 0.2
            assert torch.equal((one.x >= 0.5)[clear], (one.slope < 0)[clear])


def test_a_lower_divergence_than_nearest(tiny_model, make_settings, tiny_text, tmp_path):
    model = tiny_model()
    common = {"code": "grid", "bits": 3, "drift_correction": 0.0}
    for name, more in (("nearest", {"rounding": NEAREST}), ("disc", {"rounding": DISCQUANT, "rounding_steps": 40})):
        quantize(make_settings(model, **common, **more), tmp_path / name)
    outs = [str(tmp_path / name) for name in ("nearest", "disc")]
    found = evaluate(outs, [str(tiny_text)], str(model), 48, 8)["results"]
    nearest, disc = (figures["kl_divergence"] for figures in found)
    assert 0 < disc < 0.9 * nearest
    stored = [CheckpointReader(tmp_path / name) for name in ("nearest", "disc")]
    for name in stored[0].names():
        one, other = (reader.read([name])[name] for reader in stored)
        if name.endswith(".packed"):
            difference = (GRID.unpack(one, 3) - GRID.unpack(other, 3)).abs()
            assert difference.max() == 1 and 0.001 < float(difference.float().mean()) < 0.5
        else:
            assert torch.equal(one, other)


def test_levels_are_found_once(tiny_model, make_settings, tmp_path, monkeypatch):
    """A run that ended behind its levels goes on with them; one that ended before has the same result."""
    kept = {"ignore": (r"layers\.0\.", "1.mlp")}
    settings = make_settings(tiny_model(), code="grid", bits=2, rounding=DISCQUANT, rounding_steps=3, **kept)
    assert len(quantize(settings, tmp_path / "whole")["layers"]) == 4
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()

    def ends(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "quantize_group", ends)
        quantize(settings, tmp_path / "later")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Model, "train", ends)
        quantize(settings, tmp_path / "early")
    quantize(settings, tmp_path / "early", resume=True)
    monkeypatch.setattr(_Model, "train", ends)
    quantize(settings, tmp_path / "later", resume=True)
    for name in ("later", "early"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == wanted
        shutil.rmtree(tmp_path / name)


def test_too_little_memory_is_said_before(tiny_model, make_settings, tmp_path, monkeypatch):
    settings = make_settings(tiny_model(), code="grid", bits=2, rounding=DISCQUANT)

    class Memory:
        available = 2_000_000
        total = 2_000_000

    monkeypatch.setattr(checks.psutil, "virtual_memory", Memory)
    monkeypatch.setattr(Levels, "__init__", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=r"--rounding discquant holds the whole model, 29 bytes per weight, .*another"):
        quantize(settings, tmp_path / "out")
