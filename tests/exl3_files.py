# SPDX-License-Identifier: Apache-2.0
"""Writes EXL3 checkpoints from the specification: random codes under the names of a tiny model's linear layers."""

import json
import shutil

import numpy
import torch
from exl3_layers import MCG, MUL1, effective
from safetensors.torch import load_file, save_file

MARKS = {"mcg": MCG, "mul1": MUL1}


def padded(size):
    return size + -size % 128


def quantized_layer(n, k, bits, code, older=False, seed=0):
    """(tensors of a layer, its dense weight [n, k] in float32); older: the input side's signs are bits."""
    draw = numpy.random.default_rng(seed)
    rows, columns = padded(k) // 16, padded(n) // 16
    trellis = draw.integers(-32768, 32768, (rows, columns, int(16 * bits))).astype(numpy.int16)
    svh = (draw.choice([-1.0, 1.0], padded(n)) * draw.uniform(0.05, 0.1, padded(n))).astype(numpy.float16)
    tensors = {"trellis": trellis, "svh": svh}
    if older:
        words = draw.integers(-32768, 32768, rows).astype(numpy.int16)
        negative = numpy.unpackbits(words.view(numpy.uint8), bitorder="little")
        suh = (1.0 - 2.0 * negative).astype(numpy.float16)
        tensors["su"] = words
    else:
        suh = (draw.choice([-1.0, 1.0], padded(k)) * draw.uniform(0.5, 1.5, padded(k))).astype(numpy.float16)
        tensors["suh"] = suh
    if code in MARKS:
        tensors[code] = numpy.array(MARKS[code], numpy.uint32).view(numpy.int32)
    dense = effective(trellis, code, suh, svh)[:k, :n].T
    return {name: torch.from_numpy(one.copy()) for name, one in tensors.items()}, torch.tensor(dense.copy()).float()


def sliced(n, k, widths, inner, bits, code):
    """(tensors by "slice.i." and their names, the dense weight) of a layer in slices of its inputs or its outputs."""
    found, dense = {}, []
    for i, width in enumerate(widths):
        tensors, weight = quantized_layer(*((n, width) if inner else (width, k)), bits, code, seed=100 + i)
        found |= {f"slice.{i}.{own}": tensor for own, tensor in tensors.items()}
        dense.append(weight)
    return found, torch.cat(dense, 1 if inner else 0)


def write(source, out, code="mul1", bits=lambda name: 3, older=(), head=True, widths=()):
    """A copy of a model's folder whose linear layers, and the head if wanted, are EXL3's.

    Args:
        source: the folder of a model in one safetensors file.
        out: the new folder.
        code: of all layers.
        bits: layer name -> code bits per weight; of mul1 also a half more.
        older: last parts of names of layers whose input signs are bits.
        head: whether the output head is quantized, at 6 bits.
        widths: of the slices of each MLP, if it is cut.

    Returns:
        The state dict of the dense model, with lm_head.weight if the head is quantized.
    """
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    state, stored = load_file(out / "model.safetensors"), {}
    if head and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    elif not head:
        state.pop("lm_head.weight", None)
    for i, name in enumerate(sorted(state)):
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and (layer.endswith("_proj") or layer == "lm_head"):
            n, k = state[name].shape
            rate = 6 if layer == "lm_head" else bits(layer)
            if widths and ".mlp." in layer:
                tensors, state[name] = sliced(n, k, widths, layer.endswith("down_proj"), rate, code)
            else:
                tensors, state[name] = quantized_layer(n, k, rate, code, layer.endswith(tuple(older) or "?"), seed=i)
            stored |= {f"{layer}.{own}": tensor for own, tensor in tensors.items()}
        else:
            stored[name] = state[name]
            if leaf == "bias" and layer.endswith("_proj"):  # padded like the layer's other tensors
                room = padded(len(state[name])) - len(state[name])
                stored[name] = torch.nn.functional.pad(state[name].half(), (0, room))
                state[name] = state[name].half()
            state[name] = state[name].float()
    quantization = {"quant_method": "exl3", "version": "1.4.1", "bits": 3.0, "head_bits": 6 if head else 16}
    quantization |= {"calibration": {"rows": 250, "cols": 2048}, "out_scales": "auto", "codebook": code}
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return state
