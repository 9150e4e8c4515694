# SPDX-License-Identifier: Apache-2.0
"""One group of linear layers: every format, the proxy loss it reports, LDLQ against plain rounding, hard weights."""

from dataclasses import replace
from functools import cache

import numerics
import pytest
import torch
from random_layers import RATE_IDS, RATES

from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.quantizer import group as group_module
from quip_vllm.quantizer.group import quantize_group, signs
from quip_vllm.quantizer.hessian import Group
from quip_vllm.quantizer.settings import Settings

N = K = 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WHITE = Group(["a"], 1000 * torch.eye(K, dtype=torch.float64), 1000)


@cache
def coloured():
    x = (draw(2000, K, seed=1) @ draw(K, K, seed=2)).double()
    return Group(["a"], x.T @ x, 2000)


def settings(code, bits, **changes):
    return Settings("m", code, bits, **changes)


def dense(result, chosen, shape):
    tensors = dict(result.tensors)
    n, k = shape
    spec = LinearSpec(chosen.code, result.bits, k, (n,), chosen.hadamard_block)
    return dequantize(spec, tensors)


def loss_in_the_original_space(weight, restored, hessian):
    error = (weight - restored).double()
    return float((error @ hessian * error).sum() / (weight.double() @ hessian * weight.double()).sum())


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_white_loss_is_near_the_rate_distortion_bound(code, bits):
    chosen = settings(code, bits, damping=1e-6)
    weight = draw(N, K)
    result = quantize_group(WHITE, {"a": weight}, {"a": bits}, chosen)["a"]
    kind = "lattice" if code == "e8p" else "trellis" if bits <= 4 else "trellis, 5 to 8 bits"
    assert 1.0 < result.proxy_loss * 4**bits < numerics.LOSS_OVER_SHANNON[kind]
    expected = loss_in_the_original_space(weight, dense(result, chosen, (N, K)), WHITE.hessian)
    assert result.proxy_loss == pytest.approx(expected, rel=numerics.LOSS_IN_TWO_SPACES)
    assert result.tensors["su"].dtype == result.tensors["sv"].dtype == torch.float16
    assert set(result.tensors["su"].tolist()) == {1.0, -1.0}
    assert ("table" in result.tensors) == (code == "hyb")
    assert ("residual_codes" in result.tensors) == (code == "e8p" and bits > 2)


@pytest.mark.parametrize(("code", "block"), [("e8p", None), ("1mad", None), ("1mad", 32)])
def test_feedback_beats_plain_rounding(code, block, monkeypatch):
    chosen = settings(code, 2, hadamard_block=block, damping=1e-6)
    weight = draw(N, K)
    group = coloured()
    with_feedback = quantize_group(group, {"a": weight}, {"a": 2}, chosen)["a"]
    restored = dense(with_feedback, chosen, (N, K))
    expected = loss_in_the_original_space(weight, restored, group.hessian)
    assert with_feedback.proxy_loss == pytest.approx(expected, rel=numerics.LOSS_IN_TWO_SPACES)
    monkeypatch.setattr(group_module, "feedback", lambda hessian, block: (torch.zeros_like(hessian), 0.0))
    plain = quantize_group(group, {"a": weight}, {"a": 2}, chosen)["a"]
    assert with_feedback.proxy_loss < 0.8 * plain.proxy_loss


def test_8_bits_are_nearly_exact():
    chosen = settings("1mad", 8)
    weight = draw(48, 80)
    group = Group(["a"], 100 * torch.eye(80, dtype=torch.float64), 100)
    restored = dense(quantize_group(group, {"a": weight}, {"a": 8}, chosen)["a"], chosen, (48, 80))
    assert (restored - weight).norm() / weight.norm() < numerics.EIGHT_BITS


def test_readers_share_su_and_keep_their_rows():
    chosen = settings("1mad", 2, overrides=(("v", 4),))
    weights = {"q": draw(64, K, seed=3), "k": 5 * draw(32, K, seed=4), "v": 0.01 * draw(32, K, seed=5)}
    group = replace(WHITE, names=list(weights))
    results = quantize_group(group, weights, {"q": 2, "k": 2, "v": 4}, chosen)
    assert list(results) == ["q", "k", "v"]
    for name, weight in weights.items():
        assert torch.equal(results[name].tensors["su"], results["q"].tensors["su"])
        error = loss_in_the_original_space(weight, dense(results[name], chosen, weight.shape), WHITE.hessian)
        assert error == pytest.approx(results[name].proxy_loss, rel=numerics.LOSS_IN_TWO_SPACES)
    assert results["v"].bits == 4 and results["v"].proxy_loss < results["k"].proxy_loss / 8
    alone = quantize_group(WHITE, {"q": weights["q"]}, {"q": 2}, chosen)["q"]  # rows do not see each other
    assert torch.equal(alone.tensors["packed"], results["q"].tensors["packed"])


def test_signs_are_a_function_of_seed_and_name():
    assert torch.equal(signs(64, 0, "a"), signs(64, 0, "a"))
    assert not torch.equal(signs(64, 0, "a"), signs(64, 1, "a"))
    assert not torch.equal(signs(64, 0, "a"), signs(64, 0, "b"))


def test_dead_columns_do_no_harm():
    weight = draw(N, K)
    weight[:, 7] = 1e4  # no activation ever reaches it
    hessian = coloured().hessian.clone()
    hessian[7] = hessian[:, 7] = 0.0
    chosen = settings("e8p", 2)
    result = quantize_group(Group(["a"], hessian, 2000), {"a": weight}, {"a": 2}, chosen)["a"]
    assert result.dead_columns == 1
    live = weight.clone()
    live[:, 7] = 0.0
    assert loss_in_the_original_space(live, dense(result, chosen, (N, K)), hessian) < 0.1


def test_zero_weight():
    chosen = settings("e8p", 2)
    result = quantize_group(WHITE, {"a": torch.zeros(N, K)}, {"a": 2}, chosen)["a"]
    assert not dense(result, chosen, (N, K)).any()
    assert result.proxy_loss == 0.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "a.weight holds a NaN or an infinity"),
        (float("inf"), "a.weight holds a NaN or an infinity"),
        (1e12, "a.weight has a scale of inf: it does not fit fp16"),
        (1e-12, "a.weight has a scale of 0.0: it does not fit fp16"),
    ],
)
def test_weights_that_cannot_be_stored(value, message):
    with pytest.raises(ValueError, match=message):
        quantize_group(WHITE, {"a": torch.full((N, K), value)}, {"a": 2}, settings("e8p", 2))


def test_a_drifted_activation_gets_weights_that_mend_it():
    x0 = draw(2000, K, seed=3).double()
    x = 0.8 * x0 + 0.1 * draw(2000, K, seed=4).double()
    weight = draw(N, K)
    group = Group(["a"], x.T @ x, 2000, (x0 - x).T @ x)

    def error(share):
        chosen = settings("e8p", 4, drift_correction=share)
        kept = weight.clone()
        restored = dense(quantize_group(group, {"a": weight}, {"a": 4}, chosen)["a"], chosen, (N, K))
        assert torch.equal(weight, kept)
        return float((x0 @ weight.T.double() - x @ restored.T.double()).square().sum())

    assert error(1.0) < error(0.5) < error(0.0)
