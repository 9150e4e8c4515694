# SPDX-License-Identifier: Apache-2.0
"""The torch modules against the dequantized weight."""

import pytest
import torch
from numerics import FLOAT32_LINEAR, relative
from random_layers import random_layer

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.nn.linear import QuantizedEmbedding, QuantizedLinear
from quip_vllm.ops import dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_adds_its_bias_in_the_dtype_of_x(dtype):
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    tensors, bias, x = random_layer(spec), torch.randn(48), torch.randn(2, 3, 64)
    module = QuantizedLinear(spec, tensors, bias)
    y = module(x.to(dtype))
    assert y.dtype is dtype and y.shape == (2, 3, 48)
    if dtype is torch.float32:
        assert relative(y, x.double() @ dequantize(spec, tensors).double().T + bias) < FLOAT32_LINEAR
    assert set(module.state_dict()) == {"bias"} and "code=hyb, bits=2, backend=cpu" in repr(module)


def test_embedding_gives_rows_of_the_dequantized_weight():
    spec = LinearSpec("e8p", 4, 64, (40,), rotate_output=False)
    tensors, ids = random_layer(spec), torch.tensor([[3, 39]])
    rows = QuantizedEmbedding(spec, tensors, torch.float32)(ids)
    assert relative(rows, dequantize(spec, tensors)[ids]) < FLOAT32_LINEAR
    with pytest.raises(ValueError, match="rotate_output=False"):
        QuantizedEmbedding(LinearSpec("e8p", 4, 64, (40,)), tensors, torch.float32)
