# SPDX-License-Identifier: Apache-2.0
"""Losses in units of the KL divergence: against noise in single layers, and against quantized heads and embeddings."""

import pytest
import torch

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.evaluation.loading import load_model
from quip_vllm.quantizer import losses
from quip_vllm.quantizer.losses import measure
from quip_vllm.quantizer.noise import noisy_divergences
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.model import LayeredModel

TOKENS = torch.randint(0, 256, (24, 40), generator=torch.Generator().manual_seed(0))
FORMATS = [LayerFormat("e8p", bits) for bits in (2, 3, 4)]
SECOND_ORDER = 1.5
"""Largest factor between the second-order model, with labels that were drawn once, and a measured divergence."""


@pytest.fixture
def measured(tiny_model, make_settings, tmp_path):
    """measured(architecture, ...) -> (LayeredModel, losses, losses of noise)."""

    @torch.no_grad()
    def measured(architecture="Llama", rows=(), formats=FORMATS, tokens=TOKENS, **config):
        model = tiny_model(architecture, dtype="float32", **config)
        source = LayeredModel(model)
        names = [name for index in range(len(source.layers)) for name in source.linears(index)]
        asked = dict.fromkeys([*names, *rows], formats)
        return source, *measure(source, asked, tokens, 5, make_settings(model), tmp_path / "hidden")

    return measured


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Phi3"])
def test_noise_in_one_layer(measured, architecture):
    source, _, of_noise = measured(architecture)
    for name, loss in list(of_noise.items())[1::3]:
        variance = 0.002 / loss
        (found,) = noisy_divergences(source, TOKENS, 5, [{name: variance}], 0)
        assert 1 / SECOND_ORDER < found / 0.002 < SECOND_ORDER, name


@torch.no_grad()
def test_losses_add_up_and_fall_with_bits(measured):
    source, found, of_noise = measured()
    for of in found.values():
        assert of[FORMATS[0]] > 2 * of[FORMATS[1]] > 4 * of[FORMATS[2]] > 0
    variances = [{name: found[name][one] / of_noise[name] for name in of_noise} for one in FORMATS[1:]]
    for one, divergence in zip(FORMATS[1:], noisy_divergences(source, TOKENS, 5, variances, 0), strict=True):
        assert 1 / SECOND_ORDER < divergence / sum(of[one] for of in found.values()) < SECOND_ORDER
    assert noisy_divergences(source, TOKENS, 5, [{}], 0) == [0.0]


def test_a_few_rows_tell_of_all(measured, monkeypatch):
    _, some, _ = measured()
    monkeypatch.setattr(losses, "ROWS", 16)
    _, few, _ = measured()
    for name, of in some.items():
        for stored, loss in of.items():
            assert 0.6 < few[name][stored] / loss < 1.6, name


@torch.no_grad()
@pytest.mark.parametrize("bits", [{"lm_head": 2}, {"embedding": 2}])
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding(measured, tiny_model, make_settings, tmp_path, bits, tied):
    name = "lm_head" if "lm_head" in bits and not tied else "model.embed_tokens"
    model = tiny_model(dtype="float32", tie_word_embeddings=tied)
    settings = make_settings(model, ignore=(".",), **bits)
    tokens = calibration_tokens(settings, model, 272)
    _, found, _ = measured(rows=[name], formats=FORMATS[:1], tokens=tokens, tie_word_embeddings=tied)
    quantize(settings, tmp_path / "out")
    log_p, log_q = (load_model(str(folder))(tokens).logits.log_softmax(-1) for folder in (model, tmp_path / "out"))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert 1 / SECOND_ORDER < divergence / found[name][FORMATS[0]] < SECOND_ORDER


def test_a_layer_that_never_runs_is_named(tiny_model, make_settings, tmp_path):
    source = LayeredModel(tiny_model())
    with pytest.raises(ValueError, match="model.layers.7.q never ran on the calibration text: leave it out"):
        measure(source, {"model.layers.7.q": FORMATS}, TOKENS, 8, make_settings(source.folder), tmp_path)
