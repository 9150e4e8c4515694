# SPDX-License-Identifier: Apache-2.0
"""What a layer of vLLM holds once it is loaded: its packed weight and at most a tenth more."""

import pytest
import torch
from random_layers import RATE_IDS, RATES
from served_layers import build, finish, held, load, quant_config, random_tensors
from vllm.model_executor.layers.linear import ReplicatedLinear

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.cpu import CpuBackend

SIZE = 2048


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_a_loaded_layer_holds_its_packed_weight(set_rank, monkeypatch, code, bits):
    problem = CpuBackend().refusal(LinearSpec(code, bits, SIZE, (SIZE,)))
    if problem is not None:
        pytest.skip(problem)
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    layers = []
    for seed in range(2):
        layer = build(ReplicatedLinear, quant_config(code, bits), SIZE, SIZE, dtype=torch.bfloat16)
        load(layer, random_tensors(code, bits, SIZE, SIZE, seed))
        layers.append(finish(layer))  # alive, so that no address is used twice
    packed = SIZE * SIZE * bits // 8
    first, second = map(held, layers)
    own = sum(size for address, size in second.items() if address not in first)
    assert packed <= own <= 1.1 * packed
    # All layers share the values of LUT, as float32 and as int16, their unit, and matrices of order 1.
    assert sum(second.values()) - own <= 4 * 65536 + 2 * 65537 + 4 * 3
