# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of ``config.json``, format version 1, as a checked object (docs/formats.md)."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from quip_vllm.formats.spec import Format, LinearSpec, TileOrder, format_of, methods
from quip_vllm.formats.tensors import layout

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 1
LARGEST_COUNT = 65_536
"""Of chunks, and of what sizes are a multiple of: more would have sizes tried without end."""


class LayerFormat(NamedTuple):
    """How a layer is stored: the name of its code, code bits per weight, and what LinearSpec has by these names.

    The quantizer sets the first two alone; the others are of checkpoints that other programs have made.
    """

    code: str
    bits: int
    tile_order: TileOrder = TileOrder.MMA
    input_chunks: int = 1
    output_chunks: int = 1
    padded_to: int = 1

    @property
    def format(self) -> Format:
        """The format. Raises ValueError for a code that there is not."""
        return format_of(self.code)

    def check(self) -> None:
        """Raises ValueError unless the code exists and has these bits."""
        self.format.check_bits(self.bits)
        for key in ("input_chunks", "output_chunks", "padded_to"):
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{key} is {value!r:.100}: it must be an integer from 1 to {LARGEST_COUNT}")

    def spec(self, k: int, sizes: tuple[int, ...], block: int | None, rotate_output: bool = True) -> LinearSpec:
        """The layer of k inputs and these outputs."""
        others = dict(list(self._asdict().items())[2:])
        return LinearSpec(self.code, self.bits, k, sizes, block, rotate_output, **others)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what is as the quantizer has it is left out."""
        usual = LayerFormat(self.code, self.bits)
        others = {key: value for key, value in self._asdict().items() if value != getattr(usual, key)}
        if self.tile_order is not usual.tile_order:
            others["tile_order"] = self.tile_order.value
        return {"code": self.code, "bits": self.bits, **others}


@dataclass(frozen=True)
class Embedding:
    """The quantized input embedding, whose outputs are not rotated: its rows belong to tokens.

    Attributes:
        module: the name its tensors have.
        stored: code and bits.
    """

    KEY: ClassVar[str] = "embedding"
    OPTION: ClassVar[str] = "--embedding"
    module: str
    stored: LayerFormat

    @classmethod
    def from_dict(cls, raw: object) -> "Self | None":
        """Reads the object of the key `KEY`; None if it is absent. Raises ValueError for an ill-typed value."""
        if raw is None:
            return None
        if not isinstance(raw, Mapping):
            names = ", ".join(one.name for one in fields(cls))
            raise ValueError(f"{cls.KEY} is {raw!r:.200}: it must be an object with {names}")
        module = raw.get("module")
        if not isinstance(module, str) or not module:
            raise ValueError(f"{cls.KEY}.module is {module!r:.200}: it must be the module name of the quantized layer")
        return cls(module, _layer_format(raw.get("stored"), f"{cls.KEY}.stored"), **cls._others(raw))

    @classmethod
    def _others(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "stored": self.stored.to_dict()}


@dataclass(frozen=True)
class Head(Embedding):
    """The quantized output head, whose outputs are not rotated either.

    Attributes:
        module: the name its tensors have: the input embedding's where the two are tied, else the head's own.
        tied: the tensors are those of the input embedding as well.
    """

    KEY: ClassVar[str] = "head"
    OPTION: ClassVar[str] = "--lm-head"
    tied: bool

    @classmethod
    def _others(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        tied = raw.get("tied")
        if not isinstance(tied, bool):
            raise ValueError(f"head.tied is {tied!r:.200}: it must be true (the embedding is the head) or false")
        return {"tied": tied}


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint says of its quantized layers.

    Attributes:
        default: code and bits of every quantized layer that `layers` does not name.
        hadamard_block: None for the full-width rotation, else the largest block of the blockwise one (a power of two).
        modules_to_not_convert: module names that keep an ordinary weight. A name covers itself and everything below it.
        layers: module name -> how each layer is stored that differs from the default.
        head: the quantized output head; None if it keeps an ordinary weight.
        embedding: the quantized input embedding that is not tied to the head; None if it keeps an ordinary weight.
        parts: module name -> name and outputs of each layer of the model that it is, in the order of its rows, where
            these share one output rotation. The names are those beside its own: (("up_proj", 128), ("gate_proj", 128)).
        shapes: module name -> [n, k] of each layer whose tensors are padded.

    Raises:
        ValueError: a value is outside its range; the message names the value, the rule and the remedy.
    """

    default: LayerFormat
    hadamard_block: int | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    layers: Mapping[str, LayerFormat] = field(default_factory=dict)
    head: Head | None = None
    embedding: Embedding | None = None
    parts: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for described in (self.default, *self.layers.values(), *(rows.stored for rows in self.token_rows)):
            described.check()
        block = self.hadamard_block
        if block is not None and (type(block) is not int or block < 2 or block & (block - 1)):
            raise ValueError(
                f"hadamard_block is {block!r:.100}: give a power of two of at least 2, or null for full width"
            )
        for rows in self.token_rows:
            if rows.module in self.layers or self._skips(rows.module):
                raise ValueError(
                    f"{rows.KEY}.module is {rows.module!r}, which layers or modules_to_not_convert name as well: "
                    f"{rows.KEY} alone says how it is stored; requantize"
                )
        if self.head and self.embedding and (self.head.tied or self.head.module == self.embedding.module):
            raise ValueError(
                f"embedding.module is {self.embedding.module!r}, but head says how a tied embedding is stored: "
                "requantize"
            )

    @property
    def method(self) -> str:
        """`quant_method` in config.json: the family of the default code."""
        return self.default.format.method

    def layer_format(self, name: str) -> LayerFormat | None:
        """How the linear layer, head or embedding ``name`` is stored; None if it keeps an ordinary weight."""
        for rows in self.token_rows:
            if rows.module == name:
                return rows.stored
        return None if self._skips(name) else self.layers.get(self._fused.get(name, name), self.default)

    unused: ClassVar[frozenset[str]] = frozenset()
    """Modules of the files of which nothing is read."""

    def parts_of(self, name: str) -> list[tuple[str, int]]:
        """Full name and outputs of each layer of the model that the layer ``name`` of the files is, in order."""
        parent, dot, _ = name.rpartition(".")
        return [(parent + dot + part, rows) for part, rows in self.parts.get(name, ())]

    @cached_property
    def _fused(self) -> dict[str, str]:
        """Full name of a part -> the layer of the files."""
        return {part: name for name in self.parts for part, _ in self.parts_of(name)}

    def leaves(self, spec: LinearSpec) -> Iterable[str]:
        """The last parts of the names of a layer's tensors in the files; some may be absent."""
        return layout(spec)

    def tensors(self, name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer of the files, by the last parts of their names, as `formats.tensors.layout` has them.

        Raises:
            ValueError: something is damaged.
        """
        return dict(stored)

    @property
    def token_rows(self) -> "tuple[Embedding, ...]":
        """The quantized layers whose rows belong to tokens, so that their outputs are not rotated."""
        return tuple(rows for rows in (self.embedding, self.head) if rows is not None)

    def has_token_rows(self, name: str) -> bool:
        """Whether the tensors under ``name`` are those of the quantized embedding or output head."""
        return any(rows.module == name for rows in self.token_rows)

    def _skips(self, name: str) -> bool:
        return any(name == skip or name.startswith(skip + ".") for skip in self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` object, ready for JSON."""
        layers = {name: stored.to_dict() for name, stored in self.layers.items()}
        for name, parts in self.parts.items():
            layers.setdefault(name, self.default.to_dict())["parts"] = [list(one) for one in parts]
        for name, shape in self.shapes.items():
            layers.setdefault(name, self.default.to_dict())["shape"] = list(shape)
        return {
            "quant_method": self.method,
            "format_version": FORMAT_VERSION,
            **self.default.to_dict(),
            "hadamard_block": self.hadamard_block,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "layers": layers,
            **{rows.KEY: rows.to_dict() for rows in self.token_rows},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "CheckpointConfig":
        """Reads the ``quantization_config`` object. Unknown keys are ignored; another version is refused.

        Raises:
            ValueError: names the key, its value and what is allowed.
        """
        method, families = raw.get("quant_method"), methods()
        if not isinstance(method, str) or method not in families:
            raise ValueError(f"quant_method is {method!r:.100}: it must be one of {', '.join(families)}")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version!r:.100}: this quip_vllm reads {FORMAT_VERSION}; upgrade or requantize"
            )
        default = _layer_format({key: raw[key] for key in LayerFormat._fields if key in raw}, "quantization_config")
        if default.format.method != method:
            raise ValueError(
                f"code is {default.code!r}: it belongs to quant_method {default.format.method}, not {method}"
            )
        layers = raw.get("layers") or {}
        skip = raw.get("modules_to_not_convert") or []
        if not isinstance(layers, Mapping):
            raise ValueError(f"layers is {layers!r:.200}: it must map a layer's name to an object with code and bits")
        if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
            raise ValueError(f"modules_to_not_convert is {skip!r:.200}: it must be a list of module names")
        return cls(
            default=default,
            hadamard_block=raw.get("hadamard_block"),
            modules_to_not_convert=tuple(skip),
            layers={str(name): _layer_format(item, f"layers.{name}", OF_LAYERS) for name, item in layers.items()},
            head=Head.from_dict(raw.get(Head.KEY)),
            embedding=Embedding.from_dict(raw.get(Embedding.KEY)),
            parts={
                name: _parts(item["parts"], f"layers.{name}.parts") for name, item in layers.items() if "parts" in item
            },
            shapes={
                name: _shape(item["shape"], f"layers.{name}.shape") for name, item in layers.items() if "shape" in item
            },
        )


OF_LAYERS = ("parts", "shape")
"""What an object of ``layers`` may hold besides the fields of LayerFormat."""


def _layer_format(raw: object, key: str, others: tuple[str, ...] = ()) -> LayerFormat:
    """How an object of config.json says that a layer is stored.

    Raises:
        ValueError: it is something else, or says more: a reader that ignored a property would decode other weights.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{key} is {raw!r:.200}: it must be an object with code and bits")
    unknown = sorted(str(name) for name in raw if name not in (*LayerFormat._fields, *others))
    if unknown:
        known = ", ".join((*LayerFormat._fields, *others))
        raise ValueError(f"{key} has {', '.join(unknown):.200}: this quip_vllm knows {known}; upgrade it")
    given = {name: raw[name] for name in LayerFormat._fields[2:] if name in raw}
    if "tile_order" in given:
        given["tile_order"] = _tile_order(given["tile_order"])
    stored = LayerFormat(raw.get("code"), raw.get("bits"), **given)  # type: ignore[arg-type]  # checked next
    stored.check()
    return stored


def _tile_order(value: object) -> TileOrder:
    for order in TileOrder:
        if order.value == value:
            return order
    raise ValueError(f"tile_order is {value!r:.100}: it must be one of {', '.join(one.value for one in TileOrder)}")


def _parts(raw: object, key: str) -> tuple[tuple[str, int], ...]:
    """Name and outputs of each part. Raises ValueError for anything else."""
    pairs = [tuple(one) for one in raw if isinstance(one, list)] if isinstance(raw, list) else []
    right = [pair for pair in pairs if len(pair) == 2 and isinstance(pair[0], str) and _counts(pair[1])]
    if not isinstance(raw, list) or len(right) != len(raw) or len({name for name, _ in right}) < max(2, len(raw)):
        raise ValueError(f"{key} is {raw!r:.200}: it must be a list of two or more pairs of a name and its outputs")
    return tuple(right)


def _shape(raw: object, key: str) -> tuple[int, int]:
    if not isinstance(raw, list) or len(raw) != 2 or not all(map(_counts, raw)):
        raise ValueError(f"{key} is {raw!r:.200}: it must be the layer's outputs and inputs")
    return (raw[0], raw[1])


def _counts(value: object) -> bool:
    return type(value) is int and value > 0


def positions(config: Any) -> int | None:
    """How many tokens a sequence may have; None where the config does not limit it."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"))
    return next((one for one in found if isinstance(one, int) and one > 0), None)
