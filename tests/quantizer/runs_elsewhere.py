# SPDX-License-Identifier: Apache-2.0
"""--device: a device that is not there, and whose tensors do not mix with the CPU's, gives what the CPU gives.

`test_device.py` runs these tests in a process of their own, as torch takes the device for the machine's accelerator.
Sums are in the CPU's order, as a sum in another can turn a code over: attention is not fused, and models have no SiLU,
whose gradient torch computes otherwise on a device of ours.
"""

from collections import Counter

import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from torch.nn.attention import SDPBackend, sdpa_kernel

from quip_vllm.evaluation.report import evaluate
from quip_vllm.quantizer.planning import Target, make_plan_file
from quip_vllm.quantizer.rounding.encoders import make_encoder
from quip_vllm.quantizer.rounding.searchers import search_piece, spread
from quip_vllm.quantizer.run import quantize

THERE = str(DEVICE)
PRODUCTS = {"mm", "bmm", "linear"}
ROUNDING = {"linalg_cholesky_ex", "linalg_solve_triangular"}


def both(what, also=frozenset()):
    """what("cpu") and what(THERE), which has to compute there, with the ops `also` among others."""
    with sdpa_kernel(SDPBackend.MATH):
        here = what("cpu")
        with Elsewhere() as mode:
            there = what(THERE)
    assert mode.seen & PRODUCTS and mode.seen >= also
    return here, there


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Mistral", {"two_sided": True, "token_weights": 1.0, "tune": "full", "lm_head": 3, "embedding": 3}),
        ("Mixtral", {"code": "hyb", "two_sided": True, "tune": "blocks"}),
        ("Llama", {"code": "grid", "rounding": "greedy", "tune": "refit"}),
        ("Llama", {"code": "grid", "bits": 4, "rounding": "discquant", "rounding_steps": 3}),
    ],
)
def test_a_run(tiny_model, make_settings, tmp_path, architecture, changes):
    model = tiny_model(architecture, dtype="float32", hidden_act="gelu")

    def run(device):
        return quantize(make_settings(model, device=device, **changes), tmp_path / device)

    here, there = both(run, ROUNDING if changes.get("rounding") != "discquant" else set())
    for one, other in zip(here["layers"], there["layers"], strict=True):
        assert (one["name"], one["proxy_loss"]) == (other["name"], other["proxy_loss"])
    assert here["tuning"] == there["tuning"]


def test_searchers_have_the_cpu():
    class Here:
        """One searcher, in this process."""

        count, done = 1, Counter()

        def search(self, code, bits, pieces):
            return [search_piece(code, bits, piece, torch.get_num_threads()) for piece in pieces]

    def search(device):
        block = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).to(device)
        values, codes = spread(make_encoder("hyb", 2), Here()).encode(block)
        assert values.device == codes["packed"].device == block.device
        return values.cpu(), codes["packed"].cpu()

    here = search("cpu")
    with Elsewhere():
        there = search(DEVICE)
    assert all(map(torch.equal, here, there))


def test_evaluation(tiny_model, quantized, tiny_text):
    def measured(device):
        models = str(quantized("Gemma2")), [str(tiny_text)], str(tiny_model("Gemma2"))
        return evaluate([models[0]], *models[1:], 64, 2, device=device)["results"][0]

    here, there = both(measured)
    for key in ("perplexity", "kl_divergence", "kl_p90", "top1_agreement"):
        assert here[key] == there[key]


def test_a_plan(tiny_model, make_settings, tmp_path):
    def plan(device):
        settings = make_settings(tiny_model("Mistral", dtype="float32", hidden_act="gelu"), device=device)
        return make_plan_file(settings, Target(None, size=250_000), tmp_path / device)

    here, there = both(plan, ROUNDING)
    bits = ({name: one["bits"] for name, one in made["layers"].items()} for made in (here, there))
    assert next(bits) == next(bits) and here["loss"] == there["loss"]
