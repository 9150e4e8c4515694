# SPDX-License-Identifier: Apache-2.0
"""What the plugin's tests do with layers of vLLM: configure, build, load as a vLLM model does, finish, compare."""

import engine as served
import torch
from numerics import FLOAT32_LINEAR
from vllm.utils.torch_utils import set_default_torch_dtype

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.evaluation.verification import differences, expected_log_probabilities
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.reference import dequantize
from quip_vllm.vllm_plugin.arrival import _SENT, send
from quip_vllm.vllm_plugin.config import QuipConfig
from quip_vllm.vllm_plugin.loading import load_parameter

SENT = []
"""What was sent to layers, which has to live until they are finished."""
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def quant_config(code="1mad", bits=2, layers=None, **kwargs):
    """A config for vLLM; ``layers`` maps names to (code, bits)."""
    formats = {name: LayerFormat(*stored) for name, stored in (layers or {}).items()}
    checkpoint = CheckpointConfig(LayerFormat(code, bits), layers=formats, **kwargs)
    config = QuipConfig(checkpoint)
    config.packed_modules_mapping = dict(FUSED)
    return config


def build(kind, config, *sizes, prefix="m.layer", dtype=torch.float32, **kwargs):
    """A linear layer of vLLM, without a bias unless told otherwise."""
    return kind(*sizes, quant_config=config, prefix=prefix, params_dtype=dtype, **{"bias": False, **kwargs})


def random_tensors(code, bits, n, k, seed=0):
    """A linear layer as checkpoint format 1 stores it, written out by hand."""
    generator = torch.Generator().manual_seed(1000 * seed + bits)

    def words(*shape, dtype=torch.int16):
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, generator=generator).to(dtype)

    tensors = {
        # The seed leaves su alone: parts of one layer share it.
        "su": torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(k)).mul(2).sub(1).half(),
        "sv": torch.randn(n, generator=generator).half(),
    }
    if code == "e8p":
        tensors["codes"] = words(n, k // 8)
        if bits > 2:
            tensors["residual_codes"] = words(n, k // 8, dtype=torch.uint8 if bits == 3 else torch.int16)
    else:
        tensors["packed"] = words(-(-n // 16), k * bits)
    if code == "hyb":
        tensors["table"] = torch.randn(512, 2, generator=generator).half()
    return tensors


def load(layer, tensors, *shard_id, size=None):
    """What a vLLM model does with the weight that a layer of the checkpoint stands for; `size` as for `send`."""
    for first in [first for first, disk in _SENT.items() if disk not in SENT]:
        del _SENT[first]  # another test still holds it, and its numbers may be those of this one
    slices = tensors if isinstance(tensors, list) else [tensors]
    layer.weight.weight_loader(layer.weight, send("on.disk", slices, SENT, size), *shard_id)


def put(layer, tensors, shard_id=None):
    """Loads single tensors of a layer."""
    for name, tensor in tensors.items():
        load_parameter(getattr(layer, name), tensor, getattr(layer, name).share.covered(shard_id))


def finish(layer):
    """What vLLM does behind a checkpoint, under the model's dtype."""
    with set_default_torch_dtype(layer.params_dtype):
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def apply(layer, x, bias=None):
    """The layer's product."""
    return layer.quant_method.apply(layer, x, bias)


def dense(tensors, code, bits, block=None, rotate_output=True):
    """The weight, float32 [n, k], that the tensors of one part stand for."""
    return dequantize(LinearSpec(code, bits, len(tensors["su"]), (len(tensors["sv"]),), block, rotate_output), tensors)


def held(layer):
    """Address -> bytes of every storage behind the layer's parameters and buffers."""
    storages = [t.untyped_storage() for t in (*layer.parameters(), *layer.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def assert_close(found, expected):
    """The same up to float32's rounding."""
    assert found.shape == expected.shape
    assert torch.linalg.norm(found - expected) <= FLOAT32_LINEAR * torch.linalg.norm(expected)


def served_difference(engine, folder, eager=True):
    """The largest difference of log probabilities between vLLM and the dequantized model, over a prompt."""
    tokens, expected = expected_log_probabilities(folder)
    engine(served.start, folder, enforce_eager=eager)
    found = engine(served.scored, tokens)
    assert len(found) == len(tokens) - 1 > 20
    return float(differences(expected, found).max())
