# SPDX-License-Identifier: Apache-2.0
"""A group of linear layers, and a head: every format, the loss in the report, LDLQ against plain rounding, scales."""

from functools import cache

import numerics
import pytest
import torch
from random_layers import RATE_IDS, RATES

from quip_vllm.formats.grid import GRID
from quip_vllm.formats.spec import TileOrder
from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.quantizer import layer
from quip_vllm.quantizer.curvature.drift import Drift
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.curvature.outputs import Sensitivity
from quip_vllm.quantizer.layer import quantize_group, signs
from quip_vllm.quantizer.rounding import ldlq
from quip_vllm.quantizer.settings import Settings

N = K = 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WHITE = Inputs(["a"], 1000 * torch.eye(K, dtype=torch.float64), 1000)


@cache
def coloured():
    x = (draw(2000, K, seed=1) @ draw(K, K, seed=2)).double()
    return Inputs(["a"], x.T @ x, 2000)


def quantize(group, weights, code, bits, block=None, head=False, chunks=(1, 1), **settings):
    """Quantizes weights, of bits each, and returns name -> (entry, tensors, restored weight)."""
    bits = {name: bits for name in weights} if isinstance(bits, int) else bits
    specs = {
        name: LinearSpec(
            code,
            bits[name],
            weight.shape[1],
            (len(weight),),
            block,
            not head,
            output_chunks=chunks[0],
            input_chunks=chunks[1],
        )
        for name, weight in weights.items()
    }
    chosen = Settings("m", code, 2, hadamard_block=block, **{"damping": 1e-6, "tune": "none", **settings})
    return {
        name: (result.entry, result.tensors, dequantize(specs[name], result.tensors))
        for name, result in quantize_group(group, weights, specs, chosen).items()
    }


def loss(weight, restored, group):
    """Of the stored tensors in the original space: what the report says in the rotated one."""
    error, weight = (weight - restored).double(), weight.double()
    loss = (error @ group.hessian * error).sum() / (weight @ group.hessian * weight).sum()
    return pytest.approx(float(loss), rel=numerics.LOSS_IN_TWO_SPACES)


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_white_loss_is_near_the_rate_distortion_bound(code, bits):
    weight = draw(N, K)
    entry, tensors, restored = quantize(WHITE, {"a": weight}, code, bits)["a"]
    trellis = "trellis" if bits <= 4 else "trellis, 5 to 8 bits"
    kind = {"e8p": "lattice", "grid": "grid"}.get(code, trellis)
    assert 1.0 < entry["proxy_loss"] * 4**bits < numerics.LOSS_OVER_SHANNON[kind]
    assert entry["proxy_loss"] == loss(weight, restored, WHITE)
    assert (entry["name"], entry["shape"], entry["code"], entry["bits"]) == ("a", [N, K], code, bits)
    assert tensors["su"].dtype == tensors["sv"].dtype == torch.float16
    assert set(tensors["su"].tolist()) == {1.0, -1.0}


@pytest.mark.parametrize(("code", "block"), [("e8p", None), ("1mad", 32)])
@pytest.mark.parametrize("head", [False, True])
def test_feedback_beats_plain_rounding(code, block, head, monkeypatch):
    weight = draw(N, K)
    entry, _, restored = quantize(coloured(), {"a": weight}, code, 2, block, head)["a"]
    assert entry["proxy_loss"] == loss(weight, restored, coloured())
    monkeypatch.setattr(ldlq, "feedback", lambda hessian, block: (torch.zeros_like(hessian), 0.0))
    plain, *_ = quantize(coloured(), {"a": weight}, code, 2, block, head)["a"]
    assert entry["proxy_loss"] < 0.8 * plain["proxy_loss"]


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_outputs_without_a_transform_are_filled_up(code):
    """The refit of the vectors leaves the error of the outputs that there are."""
    weight = draw(528, K)
    entry, tensors, restored = quantize(coloured(), {"a": weight}, code, 2, tune="refit")["a"]
    assert len(tensors["sv"]) == 544 == 68 * 8 and restored.shape == weight.shape
    assert entry["proxy_loss"] == loss(weight, restored, coloured())
    assert entry["shape"] == [528, K] and entry["proxy_loss"] < 0.09


@pytest.mark.parametrize("chunks", [(1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize(("code", "tune"), [("e8p", "refit"), ("hyb", "none")])
def test_rotations_in_chunks_of_either_side(code, tune, chunks):
    """The same error as reported: with the refit of the vectors, too, which turns codes back."""
    weight = draw(N, K)
    entry, tensors, restored = quantize(coloured(), {"a": weight}, code, 2, chunks=chunks, tune=tune)["a"]
    assert entry["proxy_loss"] == loss(weight, restored, coloured())
    _, whole, _ = quantize(coloured(), {"a": weight}, code, 2, tune=tune)["a"]
    assert torch.equal(tensors["su"], whole["su"]) == (chunks == (1, 1) or tune == "none")
    key = "codes" if code == "e8p" else "packed"
    assert torch.equal(tensors[key], whole[key]) == (chunks == (1, 1))


@pytest.mark.parametrize("code", ["grid", "e8p", "hyb"])
def test_nearest_rounding_feeds_nothing_back(code, monkeypatch):
    _, tensors, _ = quantize(coloured(), {"a": draw(N, K)}, code, 3, rounding="nearest")["a"]
    monkeypatch.setattr(ldlq, "feedback", lambda hessian, block: (torch.zeros_like(hessian), 0.0))
    _, plain, _ = quantize(coloured(), {"a": draw(N, K)}, code, 3)["a"]
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(("rows", "head"), [(N, False), (301, True)])
@pytest.mark.parametrize("bits", [3, 6])
def test_each_rounding_of_the_grid(rows, head, bits):
    """Less is lost with feedback, and less again by greedy passes; a head's last tile is not full."""
    weight, found = draw(rows, K), {}
    for rounding in ("nearest", "ldlq", "greedy"):
        entry, tensors, restored = quantize(coloured(), {"a": weight}, "grid", bits, head=head, rounding=rounding)["a"]
        assert entry["proxy_loss"] == loss(weight, restored, coloured())
        assert tensors["packed"].shape == (-(-rows // 16), K * bits)
        found[rounding] = entry["proxy_loss"]
    assert found["greedy"] < found["ldlq"] < 0.8 * found["nearest"]


def test_levels_that_are_known_are_stored():
    weight = draw(N, K)
    specs = {"a": LinearSpec("grid", 3, K, (N,))}
    levels = 2.0 * torch.randint(0, 8, (N, K), generator=torch.Generator().manual_seed(9)) - 7
    settings = Settings("m", "grid", 3, damping=1e-6, tune="none")
    (result,) = quantize_group(coloured(), {"a": weight}, specs, settings, None, {"a": levels}).values()
    assert torch.equal(GRID.decode({"packed": result.tensors["packed"]}, 3, TileOrder.MMA), levels)
    assert result.entry["proxy_loss"] == loss(weight, dequantize(specs["a"], result.tensors), coloured())


def test_readers_share_su_and_keep_their_rows():
    weights = {"q": draw(64, K, seed=3), "k": 5 * draw(32, K, seed=4), "v": 0.01 * draw(32, K, seed=5)}
    results = quantize(WHITE, weights, "1mad", {"q": 2, "k": 2, "v": 4})
    assert list(results) == ["q", "k", "v"]
    for name, (entry, tensors, restored) in results.items():
        assert torch.equal(tensors["su"], results["q"][1]["su"])
        assert entry["proxy_loss"] == loss(weights[name], restored, WHITE)
    assert results["v"][0]["bits"] == 4 and results["v"][0]["proxy_loss"] < results["k"][0]["proxy_loss"] / 8
    alone = quantize(WHITE, {"q": weights["q"]}, "1mad", 2)["q"]  # rows do not see each other
    assert torch.equal(alone[1]["packed"], results["q"][1]["packed"])


def test_a_group_may_mix_codes():
    """Each has its own columns, hence its own feedback."""
    weights = {"a": draw(N, K), "b": draw(N, K, seed=1)}
    specs = {name: LinearSpec(code, 2, K, (N,)) for name, code in (("a", "1mad"), ("b", "e8p"))}
    both = quantize_group(coloured(), weights, specs, Settings("m", "1mad", 2, damping=1e-6, tune="none"))
    for name, spec in specs.items():
        alone = quantize(coloured(), {"a": weights["a"], name: weights[name]}, spec.code, 2)[name]
        assert all(torch.equal(tensor, alone[1][key]) for key, tensor in both[name].tensors.items())


def test_signs_are_a_function_of_seed_and_name():
    assert torch.equal(signs(64, 0, "a"), signs(64, 0, "a"))
    assert not torch.equal(signs(64, 0, "a"), signs(64, 1, "a"))
    assert not torch.equal(signs(64, 0, "a"), signs(64, 0, "b"))


@pytest.mark.parametrize("head", [False, True])
def test_dead_columns_do_no_harm(head):
    weight = draw(N, K)
    weight[:, 7] = 1e4  # no activation ever reaches it
    hessian = coloured().hessian.clone()
    hessian[7] = hessian[:, 7] = 0.0
    group = Inputs(["a"], hessian, 2000)
    entry, _, restored = quantize(group, {"a": weight}, "e8p", 2, head=head)["a"]
    assert entry["dead_columns"] == 1
    weight[:, 7] = 0.0
    assert loss(weight, restored, group).expected < 0.1


def test_zero_weight():
    entry, _, restored = quantize(WHITE, {"a": torch.zeros(N, K)}, "e8p", 2)["a"]
    assert not restored.any() and entry["proxy_loss"] == 0.0


@pytest.mark.parametrize(
    ("value", "head", "message"),
    [
        (float("nan"), False, "a.weight holds a NaN or an infinity: .*--ignore"),
        (float("inf"), True, "a.weight holds a NaN or an infinity: .*leave --lm-head or --embedding away"),
        (1e12, False, "a.weight has a scale of inf: it does not fit fp16; .*--ignore"),
        (1e12, True, "a.weight has a scale of inf: it does not fit fp16; leave --lm-head or --embedding away"),
        (1e-12, False, "a.weight has a scale of 0.0: it does not fit fp16"),
    ],
)
def test_weights_that_cannot_be_stored(value, head, message):
    with pytest.raises(ValueError, match=message):
        quantize(WHITE, {"a": torch.full((N, K), value)}, "e8p", 2, head=head)


def test_a_drifted_activation_gets_weights_that_mend_it():
    x0 = draw(2000, K, seed=3).double()
    x = 0.8 * x0 + 0.1 * draw(2000, K, seed=4).double()
    weight, kept = draw(N, K), draw(N, K)
    group = Inputs(["a"], x.T @ x, 2000, Drift((x0 - x).T @ x))

    def error(share):
        _, _, restored = quantize(group, {"a": weight}, "e8p", 4, drift_correction=share)["a"]
        return float((x0 @ weight.T.double() - x @ restored.T.double()).square().sum())

    assert error(1.0) < error(0.5) < error(0.0)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("code", ["e8p", "1mad"])
def test_rows_of_a_head_have_scales_of_their_own(code):
    weight = draw(37, 96) * torch.logspace(-2, 2, 37)[:, None]
    weight[5] = 0.0
    weight[6] = 1e-12  # too small for a scale in fp16
    group = Inputs(["a"], torch.eye(96, dtype=torch.float64), 1)
    entry, tensors, restored = quantize(group, {"a": weight}, code, 4, head=True)["a"]
    assert not restored[5:7].any() and tensors["sv"].shape == (37,)
    live = [i for i in range(37) if i not in (5, 6)]
    assert ((restored - weight).norm(dim=1) / weight.norm(dim=1))[live].max() < 0.2
    assert entry["proxy_loss"] == loss(weight, restored, group)


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_chunks_of_a_head_do_not_change_a_bit(code, monkeypatch):
    weight = draw(90, K)
    whole = quantize(coloured(), {"a": weight}, code, 2, head=True)["a"]
    monkeypatch.setattr(layer, "CHUNK_WEIGHTS", 32 * K)
    pieces = quantize(coloured(), {"a": weight}, code, 2, head=True)["a"]
    assert all(torch.equal(pieces[1][name], tensor) for name, tensor in whole[1].items())
    assert pieces[0]["proxy_loss"] == pytest.approx(whole[0]["proxy_loss"])


def felt(n, energy=3.0, seed=7):
    """A sensitivity whose outputs are correlated."""
    g = draw(500, n, seed=seed) @ draw(n, n, seed=seed + 1)
    return Sensitivity(torch.ones(500), energy, g.T @ g / g.square().sum() * n)


@pytest.mark.parametrize(("code", "gain"), [("e8p", 0.8), ("1mad", 0.97)])
def test_two_sides_lose_less_of_what_the_loss_feels(code, gain):
    """The divergence in the report is that of the stored tensors, undamped, in the original space."""
    weights = {"a": draw(N, K), "b": draw(48, K, seed=1)}
    known = {"a": felt(N), "b": felt(48, seed=9)}
    losses = {}
    for two_sided in (False, True):
        specs = {name: LinearSpec(code, 2, K, (len(weight),)) for name, weight in weights.items()}
        settings = Settings("m", code, 2, damping=1e-6, two_sided=two_sided, tune="none")
        results = quantize_group(coloured(), weights, specs, settings, known)
        for name, result in results.items():
            error = (weights[name] - dequantize(specs[name], result.tensors)).double()
            outputs, inputs = known[name].outputs.double(), coloured().hessian
            metric = outputs if two_sided else torch.eye(len(error), dtype=torch.float64)
            lost = (metric @ error @ inputs * error).sum() / metric.trace() / inputs.trace()
            felt_loss = (outputs @ error @ inputs * error).sum()
            losses.setdefault(name, []).append(float(felt_loss))
            expected = 3.0 * float(lost) / 2
            wanted = pytest.approx(expected, rel=numerics.LOSS_IN_TWO_SPACES)
            assert result.entry["expected_divergence"] == wanted
    for one, both in losses.values():
        assert both < gain * one
    plain = quantize_group(coloured(), weights, specs, Settings("m", code, 2, damping=1e-6, tune="none"))
    assert plain["a"].entry["expected_divergence"] is None
    one_side = Settings("m", code, 2, damping=1e-6, two_sided=False, tune="none")
    aside = quantize_group(coloured(), weights, specs, one_side, known)
    assert all(torch.equal(tensor, aside["a"].tensors[key]) for key, tensor in plain["a"].tensors.items())
