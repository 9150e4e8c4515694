# SPDX-License-Identifier: Apache-2.0
"""Writes QuIP# and QTIP checkpoints from their specification: random codes in place of a tiny model's linear layers."""

import json
import shutil

import numpy
import torch
from relaxml_layers import effective, lattice, trellis_weight
from safetensors.torch import load_file, save_file

CODEBOOKS = {2: ("E8P12", 1, 4, 7), 3: ("E8P12RVQ3B", 0, 2.6666666666666665, 18), 4: ("E8P12RVQ4B", 1, 2, 17)}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}


def vectors(draw, n, k, rms):
    """SU and SV: any real numbers; the weight gets a root mean square of about 0.05."""
    su = draw.choice([-1.0, 1.0], k) * draw.uniform(0.5, 1.5, k)
    return su, draw.choice([-1.0, 1.0], n) * draw.uniform(0.04, 0.06, n) / rms


def quip_sharp_layer(n, k, bits, segments=(), seed=0, wscale=None, rescaled=False):
    """(tensors of a module, its dense weight [n, k] in float32); segments: outputs of each part of a fused one."""
    draw = numpy.random.default_rng(seed)
    words = draw.integers(-(2**63), 2**63 - 1, (n, k * bits // 64))
    su, sv = (one.astype(numpy.float16) for one in vectors(draw, n, k, 1.1))
    tensors = {"Qidxs": words, "SU": su, "SV": sv, "codebook_id": numpy.array(CODEBOOKS[bits][3])}
    scale, real = sv.astype(float), su.astype(float)
    if wscale:
        tensors["Wscale"] = numpy.array(wscale, numpy.float32)
        scale = scale * wscale
    if segments:
        factors = draw.uniform(0.5, 2, len(segments)).astype(numpy.float16)
        tensors["fuse_scales"] = factors
        scale = scale * numpy.repeat(factors.astype(float), segments)
    if rescaled:
        tensors["scaleWH"] = draw.uniform(0.5, 2, k).astype(numpy.float32)
        real = real / tensors["scaleWH"]
    dense = effective(lattice(words, bits), real, scale)
    return {name: torch.from_numpy(numpy.asarray(one)) for name, one in tensors.items()}, torch.tensor(dense).float()


TABLES = {"quantlut_sym": (9, 2), "lut": (16, 1), "quantlut": (10, 1)}
"""decode_mode -> tlut_bits and V, where a test wants no others; V is 1 with other modes, which have no tlut."""


def qtip_layer(n, k, bits, mode, side=0, ranks=8, seed=0, older=False, table_bits=None, dim=None):
    """(tensors of a layer, its dense weight [n, k] in float32).

    Args:
        n, k, bits: outputs, inputs, K.
        mode: decode_mode.
        side, ranks: rcp and tp_rank, unless older.
        seed: of everything.
        older: whether rcp and tp_rank are absent.
        table_bits, dim: of tlut, if others than in TABLES.
    """
    draw = numpy.random.default_rng(seed)
    trellis = draw.integers(-32768, 32768, (n * k // 256, 16 * bits)).astype(numpy.int16)
    su, sv = vectors(draw, n, k, 1.0)
    su, sv = su.astype(numpy.float16), sv.astype(numpy.float32)
    tensors, table = {"trellis": trellis, "SU": su, "SV": sv}, None
    if mode in TABLES:
        size = 1 << (table_bits or TABLES[mode][0]), dim or TABLES[mode][1]
        table = tensors["tlut"] = draw.normal(size=size).astype(numpy.float16)
    if not older:
        tensors |= {"rcp": numpy.array(side), "tp_rank": numpy.array(ranks)}
    weight = trellis_weight(trellis, n, k, bits, mode, table)
    dense = effective(weight, su, sv, ranks if side == 1 else 1, ranks if side == 2 else 1)
    return {name: torch.from_numpy(numpy.asarray(one)) for name, one in tensors.items()}, torch.tensor(dense).float()


def write_quip_sharp(source, out, bits=2, wscale=None, rescaled=False):
    """A copy of a model's folder without its tokenizer, with QuIP#'s layers; returns the dense state dict."""
    codebook, version, packed, _ = CODEBOOKS[bits]
    state = load_file(source / "model.safetensors")
    stored = {name: one for name, one in state.items() if not name.endswith("_proj.weight")}
    parents = sorted({name.rsplit(".", 2)[0] for name in state if name.endswith("_proj.weight")})
    for parent in parents:
        fused = {leaf: parts for leaf, parts in FUSED.items() if f"{parent}.{parts[0]}.weight" in state}
        alone = {leaf: (leaf,) for leaf in ("o_proj", "down_proj") if f"{parent}.{leaf}.weight" in state}
        for leaf, parts in {**fused, **alone}.items():
            weights = [state[f"{parent}.{part}.weight"] for part in parts]
            rows = [len(one) for one in weights]
            segments = rows if leaf in fused else ()
            tensors, dense = quip_sharp_layer(
                *(sum(rows), weights[0].shape[1], bits, segments), seed=len(stored), wscale=wscale, rescaled=rescaled
            )
            stored |= {f"{parent}.{leaf}.{own}": one for own, one in tensors.items()}
            for part, piece in zip(parts, dense.split(rows), strict=True):
                state[f"{parent}.{part}.weight"] = piece
    parameters = {
        "lora_rank": 0,
        "rescale_WH": rescaled,
        "codebook": codebook,
        "codebook_version": version,
        "codesz": 8,
    }
    parameters |= {"idx_dtype": "torch.int64", "packsz": packed, "resid_scale_override": -1, "model_version": 1}
    return finish(source, out, stored, state, parameters)


def write_qtip(source, out, bits=2, mode="quantlut_sym", v_bits=None, split=False, skipped=(), older=False, **table):
    """As write_quip_sharp, with QTIP's layers.

    Args:
        source, out: folders.
        bits: of all layers, but with v_bits of v_proj.
        mode: decode_mode.
        v_bits: K_v_proj.
        split: whether rotations are in eight chunks, as for tensor parallelism.
        skipped: names of layers that keep their weight.
        older: whether rcp, tp_rank and skip_list are absent.
        **table: table_bits and dim of `qtip_layer`.
    """
    state = load_file(source / "model.safetensors")
    stored = {}
    for i, name in enumerate(sorted(state)):
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or not layer.endswith("_proj") or layer in skipped:
            stored[name] = state[name]
            continue
        rate = v_bits if v_bits and layer.endswith("v_proj") else bits
        side = (1 if layer.endswith(("o_proj", "down_proj")) else 2) if split else 0
        tensors, state[name] = qtip_layer(*state[name].shape, rate, mode, side, seed=i, older=older, **table)
        stored |= {f"{layer}.{own}": one for own, one in tensors.items()}
    table_bits, dim = TABLES.get(mode, (0, 1))
    table_bits, dim = table.get("table_bits", table_bits), table.get("dim", dim)
    parameters = {"codebook": "bitshift", "codebook_version": 0, "L": table_bits if mode == "lut" else 16, "K": bits}
    parameters |= {"td_x": 16, "td_y": 16, "V": dim, "tlut_bits": table_bits, "decode_mode": mode}
    if not older:
        parameters |= {"split_for_tp": split, "skip_list": [f"{name.split('.')[2]}_v" for name in skipped]}
    if v_bits:
        parameters["K_v_proj"] = v_bits
    return finish(source, out, stored, state, parameters)


def finish(source, out, stored, state, parameters):
    """Writes the folder; returns the state dict in float32."""
    shutil.copytree(source, out, ignore=lambda _, names: [name for name in names if "token" in name])
    config = json.loads((source / "config.json").read_text())
    config |= {"quip_params": parameters, "_name_or_path": str(source)}
    (out / "config.json").write_text(json.dumps(config))
    save_file(
        {name: one.contiguous() for name, one in stored.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )
    return {name: one.float() for name, one in state.items()}
