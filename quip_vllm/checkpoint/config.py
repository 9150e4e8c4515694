# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of ``config.json``, format version 1, as a checked object."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quip_vllm.formats.methods import STATE_BITS, Code, Method, supported_bits, vector_dim

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Head:
    """The quantized output head, whose outputs are not rotated.

    Attributes:
        module: the name its tensors have: the input embedding's where the two are tied, else the head's own.
        bits: code bits per weight.
        tied: the tensors are those of the input embedding as well.
    """

    module: str
    bits: int
    tied: bool

    @classmethod
    def from_dict(cls, raw: object) -> "Head | None":
        """Reads the key ``head``; None where it is absent. Raises ValueError for what is ill-typed."""
        if raw is None:
            return None
        if not isinstance(raw, Mapping):
            raise ValueError(f"head is {raw!r:.200}: it must be an object with module, bits and tied")
        module, tied = raw.get("module"), raw.get("tied")
        if not isinstance(module, str) or not module:
            raise ValueError(f"head.module is {module!r:.200}: it must be the module name of the quantized head")
        if not isinstance(tied, bool):
            raise ValueError(f"head.tied is {tied!r:.200}: it must be true (the embedding is the head) or false")
        return cls(module, raw.get("bits"), tied)  # type: ignore[arg-type]  # checked by CheckpointConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint says of itself.

    Attributes:
        method: the quantization method of every quantized layer.
        bits: code bits per weight, where ``overrides`` names nothing else.
        code: the trellis code; None for quip_sharp.
        hadamard_block: None for the full-width rotation, else the largest block of the blockwise one (a power of two).
        modules_to_not_convert: module names that keep an ordinary weight. A name covers itself and everything below it.
        overrides: module name -> bits of that layer.
        head: the quantized output head; None where head and embedding keep an ordinary weight.

    Raises:
        ValueError: a value is outside its range; the message names the value, the rule and the remedy.
    """

    method: Method
    bits: int
    code: Code | None = None
    hadamard_block: int | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    overrides: Mapping[str, int] = field(default_factory=dict)
    head: Head | None = None

    def __post_init__(self) -> None:
        if (self.method is Method.QTIP) != (self.code is not None):
            raise ValueError(f"code is {self.code} for method {self.method.value}: qtip needs one, quip_sharp has none")
        for bits in (self.bits, *self.overrides.values(), *([] if self.head is None else [self.head.bits])):
            check_bits(self.method, self.code, bits)
        block = self.hadamard_block
        if block is not None and (type(block) is not int or block < 2 or block & (block - 1)):
            raise ValueError(f"hadamard_block is {block!r}: give a power of two of at least 2, or null for full width")

        if self.head is not None and (self.head.module in self.overrides or self._skips(self.head.module)):
            raise ValueError(
                f"head.module is {self.head.module!r}, which overrides or modules_to_not_convert name as well: head "
                "alone says how it is stored; requantize"
            )

    def bits_of(self, name: str) -> int | None:
        """Bits of the linear layer or head ``name`` (its Hugging Face name), or None where it is not quantized."""
        if self.is_head(name):
            assert self.head is not None
            return self.head.bits
        return None if self._skips(name) else self.overrides.get(name, self.bits)

    def is_head(self, name: str) -> bool:
        """Whether the tensors under ``name`` are the quantized output head."""
        return self.head is not None and name == self.head.module

    def _skips(self, name: str) -> bool:
        return any(name == skip or name.startswith(skip + ".") for skip in self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` object, ready for JSON."""
        trellis: dict[str, Any] = {}
        if self.code is not None:
            trellis = {"code": self.code.value, "state_bits": STATE_BITS, "vector_dim": vector_dim(self.code)}
        return {
            "quant_method": self.method.value,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            **trellis,
            "hadamard_block": self.hadamard_block,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "overrides": {name: {"bits": bits} for name, bits in self.overrides.items()},
            **({} if self.head is None else {"head": asdict(self.head)}),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "CheckpointConfig":
        """Reads ``quantization_config``. The input is untrusted: what is ill-typed or out of range is refused.

        Raises:
            ValueError: names the key, its value and what is allowed.
        """
        method = _member(Method, raw.get("quant_method"), "quant_method")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version!r}: this quip_vllm reads {FORMAT_VERSION}; upgrade or requantize"
            )
        code = _member(Code, raw.get("code"), "code") if method is Method.QTIP else None
        if code is not None:
            for key, want in (("state_bits", STATE_BITS), ("vector_dim", vector_dim(code))):
                if raw.get(key, want) != want:
                    raise ValueError(f"{key} is {raw[key]!r}: code {code.value} is served with {want} only; requantize")
        overrides = raw.get("overrides") or {}
        skip = raw.get("modules_to_not_convert") or []
        if not isinstance(overrides, Mapping) or not all(isinstance(v, Mapping) for v in overrides.values()):
            raise ValueError(f"overrides is {overrides!r:.200}: it must map a layer's name to an object with its bits")
        if not isinstance(skip, list | tuple) or not all(isinstance(name, str) for name in skip):
            raise ValueError(f"modules_to_not_convert is {skip!r:.200}: it must be a list of module names")
        return cls(
            method=method,
            bits=raw.get("bits"),  # type: ignore[arg-type]  # checked by __post_init__
            code=code,
            hadamard_block=raw.get("hadamard_block"),
            modules_to_not_convert=tuple(skip),
            overrides={str(name): item.get("bits") for name, item in overrides.items()},
            head=Head.from_dict(raw.get("head")),
        )


def check_bits(method: Method, code: Code | None, bits: object) -> None:
    """Raises ValueError unless the method (and code) has ``bits`` bits per weight."""
    allowed = supported_bits(method, code)
    if type(bits) is not int or bits not in allowed:
        label = method.value if code is None else f"{method.value} with code {code.value}"
        raise ValueError(f"bits is {bits!r}: {label} has {', '.join(map(str, allowed))}; choose one of them")


def _member(kind: Any, value: object, key: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member.value) for member in kind)
        raise ValueError(f"{key} is {value!r}: it must be one of {choices}") from None
