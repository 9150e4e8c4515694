# SPDX-License-Identifier: Apache-2.0
"""QTIP checkpoints, and those of YAQA and GuidedQuant, which are alike (docs/imports.md): see `read`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.published import (
    DAMAGED,
    Published,
    check_layers,
    check_parameters,
    dense_modules,
    leaves_of,
    natural,
    sizes_of,
    vector_of,
)
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.formats.relaxml import TWO_MAD_SCALE, state_table, streams
from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.tensors import SU, SV
from quip_vllm.formats.trellis import STATE_BITS
from quip_vllm.formats.trellis_codes import HYB_TABLE_BITS, PACKED, PAIRS, STORED, TABLE
from quip_vllm.transforms.hadamard import factor

_TRELLIS, _SU, _SV, _TABLE, _SIDE, _RANKS = "trellis", "SU", "SV", "tlut", "rcp", "tp_rank"
_LEAVES = (_TRELLIS, _SU, _SV, _TABLE, _SIDE, _RANKS)
_HYB = "quantlut_sym"
_CODES = {_HYB: "hyb", "1mad": "1mad", "3inst": "3inst"}
"""decode_mode in config.json -> the code, of those whose values are computed, or looked up in HYB's way."""

_TABLED = ("lut", "quantlut", "2mad")
"""Those whose values are stored here, one or a pair for every state."""

_STORED = (_HYB, "lut", "quantlut")
"""Those that have a table in the files."""

_KERNEL_BITS = (2, 3, 4)
"""Rates of hyb that are stored in the order of a GPU kernel."""

_SEARCH = ("codebook", "codebook_version", "L", "K", "K_v_proj", "V", "tlut_bits", "decode_mode", "td_x", "td_y")
_KNOWN = (*_SEARCH, "skip_list", "split_for_tp")
"""Parameters that are read, and those that the tensors say as well."""


@dataclass(frozen=True)
class QtipConfig(Published):
    """What a QTIP checkpoint says of its layers; made by `read`.

    Attributes:
        mode: decode_mode.
    """

    mode: str = _HYB

    def leaves(self, spec: LinearSpec) -> Iterable[str]:
        """See CheckpointConfig."""
        return _LEAVES

    def tensors(self, name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See CheckpointConfig."""
        spec = self.specs[name]
        kernel_order = spec.tile_order is TileOrder.MMA
        tensors = {
            PACKED: streams(stored[_TRELLIS], spec.out_features, spec.in_features, kernel_order),
            SU.name: vector_of(stored[_SU]),
            SV.name: vector_of(stored[_SV]),
        }
        if self.mode == _HYB:
            tensors[TABLE] = stored[_TABLE].half()
        elif self.mode in _TABLED:
            tensors[TABLE] = state_table(self.mode, stored.get(_TABLE))
        if self.mode == "2mad":
            tensors[SV.name] = vector_of(stored[_SV].float() / TWO_MAD_SCALE)
        return tensors


def recognises(model: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a QTIP checkpoint, one that is not read here included."""
    parameters = model.get("quip_params")
    return isinstance(parameters, Mapping) and parameters.get("codebook") == "bitshift"


def read(model: Mapping[str, Any], reader: CheckpointReader) -> QtipConfig:
    """Checks a QTIP checkpoint's headers, and reads two scalars of each layer: how its rotation is cut.

    Raises:
        ValueError: something is damaged, contradicts config.json, or is not read here; it says which.
    """
    parameters = model["quip_params"]
    _check_parameters(parameters)
    owned = leaves_of(reader.names())
    names = [name for name, own in owned.items() if own & set(_LEAVES)]
    if not names:
        raise ValueError(f"no tensor is named {_TRELLIS}: {DAMAGED}")
    sizes = sizes_of(model)
    layers = {}
    specs: dict[str, LinearSpec] = {}
    for name in sorted(names, key=natural):
        bits = parameters["K"]
        if name.endswith(".v_proj") and parameters.get("K_v_proj") is not None:
            bits = parameters["K_v_proj"]
        stored = LayerFormat(*_stored(parameters, bits))
        n, k = _check(reader, name, owned[name], stored, parameters, sizes)
        layers[name] = _chunked(reader, name, owned[name], stored, n, k)
        specs[name] = layers[name].spec(k, (n,), None)
        try:
            specs[name].check_sizes()
        except ValueError as error:
            raise ValueError(f"{name}: {error}; {DAMAGED}") from None
    check_layers(model, owned, set(specs))
    usual = Counter(layers.values()).most_common(1)[0][0]
    default = LayerFormat(usual.code, usual.bits)
    dense, mode = dense_modules(reader.headers()), parameters["decode_mode"]
    return QtipConfig(default, modules_to_not_convert=dense, layers=layers, specs=specs, mode=mode)


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raises ValueError for a trellis that is not read here."""
    check_parameters(parameters, _KNOWN)
    mode = parameters.get("decode_mode")
    if not isinstance(mode, str) or mode not in (*_CODES, *_TABLED):
        raise ValueError(f"decode_mode is {mode!r:.100}: QTIP's {', '.join((*_CODES, *_TABLED))} are read")
    state_bits = tuple(range(1, STATE_BITS + 1)) if mode == "lut" else (STATE_BITS,)
    wanted: dict[str, tuple[object, ...]] = {"codebook_version": (0,), "L": state_bits, "td_x": (16,), "td_y": (16,)}
    wanted["V"] = (2,) if mode == _HYB else (1, 2) if mode in _STORED else (1,)
    if mode in _STORED:
        rows = {_HYB: (HYB_TABLE_BITS,), "lut": (parameters.get("L"),)}
        wanted["tlut_bits"] = rows.get(mode, tuple(range(1, STATE_BITS + 1)))
    for key, values in wanted.items():
        found = parameters.get(key, 0 if key == "codebook_version" else None)
        if type(found) is not int or found not in values:
            read = f"{values[0]} to {values[-1]}" if len(values) > 2 else " or ".join(map(str, values))
            raise ValueError(f"quip_params has {key} {found!r:.100}: with decode_mode {mode} {read} is read")
    for key in ("K", "K_v_proj"):
        if key == "K" or parameters.get(key) is not None:
            bits = parameters.get(key)
            LayerFormat(_code(parameters), bits).check()  # type: ignore[arg-type]  # that is what is checked
            if bits * parameters["V"] > parameters["L"]:
                raise ValueError(
                    f"quip_params has {key} {bits}, with V {parameters['V']} more bits per step than the "
                    f"{parameters['L']} of a state: {DAMAGED}"
                )


def _code(parameters: Mapping[str, Any]) -> str:
    return _CODES.get(parameters["decode_mode"], (STORED, PAIRS)[parameters["V"] - 1].name)


def _stored(parameters: Mapping[str, Any], bits: int) -> tuple[str, int, TileOrder]:
    code = _code(parameters)
    return code, bits, TileOrder.MMA if code == "hyb" and bits in _KERNEL_BITS else TileOrder.ROW_MAJOR


def _check(
    reader: CheckpointReader,
    name: str,
    leaves: set[str],
    stored: LayerFormat,
    parameters: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
) -> tuple[int, int]:
    """Outputs and inputs of a layer. Raises ValueError unless its tensors are those of a layer of the model's size."""
    table = ((1 << parameters["tlut_bits"], parameters["V"]),) if parameters["decode_mode"] in _STORED else ()
    wanted = {_TRELLIS, _SU, _SV} | ({_TABLE} if table else set())
    if not wanted <= leaves or leaves - wanted - {_SIDE, _RANKS, "bias"}:
        raise ValueError(
            f"{name} has tensors {', '.join(sorted(leaves)):.200}, where {', '.join(sorted(wanted))} and at most "
            f"{_SIDE}, {_RANKS} and bias are wanted: {DAMAGED}"
        )
    k, n = (shape[0] if len(shape := reader.shapes[f"{name}.{leaf}"]) == 1 else 0 for leaf in (_SU, _SV))
    served = sizes.get(name.rpartition(".")[2], (k, n))
    if served != (k, n):
        raise ValueError(
            f"{name} is stored with {k} inputs and {n} outputs, but config.json gives it {served[0]} and {served[1]}: "
            f"{DAMAGED}"
        )
    together = 32 if stored.tile_order is TileOrder.MMA else 16  # a block of tiles, or a tile
    if not n or not k or n % together or k % together:
        raise ValueError(f"{name} has {n} outputs and {k} inputs, which have to be multiples of {together}: {DAMAGED}")
    one = ((), (1,))
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        **{_TRELLIS: ((n * k // 256, 16 * stored.bits),), _SU: ((k,),), _SV: ((n,),), _SIDE: one, _RANKS: one},
        **{_TABLE: table, "bias": ((n,),)},
    }
    for leaf in leaves:
        found, dtype = reader.shapes[f"{name}.{leaf}"], reader.dtypes[f"{name}.{leaf}"]
        if leaf == _TRELLIS:
            right = dtype is torch.int16
        elif leaf in (_SIDE, _RANKS):
            right = not dtype.is_floating_point
        else:
            right = dtype.is_floating_point and dtype.itemsize > 1
        if not right or found not in shapes[leaf]:
            raise ValueError(f"{name} has {leaf} {dtype} {found} in place of {shapes[leaf][0]}: {DAMAGED}")
    return n, k


def _chunked(reader: CheckpointReader, name: str, leaves: set[str], stored: LayerFormat, n: int, k: int) -> LayerFormat:
    """The format with the chunks in which one side is rotated. Raises ValueError where that side has no such chunks."""
    side, ranks = (
        int(reader.read([f"{name}.{leaf}"])[f"{name}.{leaf}"]) if leaf in leaves else default
        for leaf, default in ((_SIDE, 0), (_RANKS, 8))
    )
    if side not in (0, 1, 2):
        raise ValueError(f"{name} has {_SIDE} {side}, which must be 0, 1 or 2: {DAMAGED}")
    size = {0: 0, 1: k, 2: n}[side]
    if side and (not 1 <= ranks <= size or size % ranks):
        raise ValueError(
            f"{name} has {_RANKS} {ranks}, which cuts its {size} rows or columns in no equal chunks: {DAMAGED}"
        )
    try:
        factor(size // ranks if side == 1 else k)
        factor(size // ranks if side == 2 else n)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if side == 0:
        return stored
    return stored._replace(input_chunks=ranks) if side == 1 else stored._replace(output_chunks=ranks)
