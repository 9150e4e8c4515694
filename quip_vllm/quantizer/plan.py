# SPDX-License-Identifier: Apache-2.0
"""Which layers are quantized, and the code and bits of each: decided once, before a run begins."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from quip_vllm.checkpoint.config import CheckpointConfig, Embedding, Head, LayerFormat
from quip_vllm.checkpoint.cuts import Cut, chunked, cut_of
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import layout
from quip_vllm.ops.rotations import sizes_problem
from quip_vllm.quantizer.settings import NARROWEST, SPLITS, Settings
from quip_vllm.quantizer.source.mixture import Mixture
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.transforms.hadamard import block_size

LINEAR_LATENT = ("minicpm3",)
"""Models with latent attention that vLLM computes with `kv_b_proj` as a linear layer."""


@dataclass(frozen=True)
class Plan:
    """What becomes of every linear layer of a model.

    Attributes:
        specs: full module name -> how the layer will be stored, in the order of the model: an embedding that is not
            tied to the output head first, the head last.
        kept: names of the linear layers that keep their weight.
        head: name of the output head among `specs`; None where it keeps its weight.
        embedding: the same of an embedding that is not tied to the head.
    """

    specs: dict[str, LinearSpec]
    kept: tuple[str, ...]
    head: str | None
    embedding: str | None

    def config(self, settings: Settings, tied: bool) -> CheckpointConfig:
        """The description of the finished checkpoint; `tied` says whether the head is the input embedding as well."""
        formats = {
            name: LayerFormat(spec.code, spec.bits, input_chunks=spec.input_chunks, output_chunks=spec.output_chunks)
            for name, spec in self.specs.items()
        }
        shapes = {name: (spec.out_features, spec.in_features) for name, spec in self.specs.items() if spec.padded}
        head = None if self.head is None else Head(self.head, formats.pop(self.head), tied)
        embedding = None if self.embedding is None else Embedding(self.embedding, formats.pop(self.embedding))
        default = LayerFormat(settings.code, settings.bits, output_chunks=settings.split or 1)
        others = {name: stored for name, stored in formats.items() if stored != default}
        return CheckpointConfig(default, settings.hadamard_block, self.kept, others, head, embedding, shapes=shapes)

    def weights(self) -> int:
        """How many weights the quantized layers have."""
        return sum(spec.in_features * spec.out_features for spec in self.specs.values())

    def stored_bytes(self) -> int:
        """Size of all quantized layers in the checkpoint."""
        return sum(map(bytes_of, self.specs.values()))


def bytes_of(spec: LinearSpec) -> int:
    """Size of the tensors of a quantized layer."""
    return sum(math.prod(one.shape) * one.dtypes[0].itemsize for one in layout(spec).values())


def make_plan(settings: Settings, source: LayeredModel) -> Plan:
    """Decides for every linear layer of the model.

    Raises:
        ValueError: a layer that is to be quantized cannot be, none is left, or a pattern matches none.
    """
    _check_planned(settings, source)
    (embedding, head), token_rows = _token_rows(settings, source)
    specs: dict[str, LinearSpec] = {}
    kept = [name for name in source.other_linears if name != head] + source.beyond
    layers = {name: module for index in range(len(source.layers)) for name, module in source.linears(index).items()}
    _check_patterns("--ignore", settings.ignore, [*layers, *source.other_linears])
    _check_patterns("--override", [pattern for pattern, _ in settings.overrides], list(layers))
    for name, module in layers.items():
        stored = settings.layer_format(name)
        if stored is None:
            kept.append(name)
        elif name.endswith(".kv_b_proj") and source.config.model_type not in LINEAR_LATENT:
            raise ValueError(
                f"{name} cannot be quantized: vLLM's latent attention multiplies by its dense weight; give --ignore "
                "kv_b_proj, or in a plan bits null"
            )
        else:
            specs[name] = _spec(settings, name, module.weight.shape, stored)
    for index in range(len(source.layers)):
        kept += source.routers(index)
        for mixture in source.mixtures(index):
            kept = _experts_in_one(mixture, specs, kept)
            if mixture.name in kept and source.reader.is_piece(f"{mixture.linears[0]}.weight"):
                raise ValueError(
                    f"{mixture.name} cannot keep its weights, because the model's files stack those of all experts and "
                    "the checkpoint would not: give an --ignore that leaves experts out"
                )
    of_tokens = {
        name: _spec(settings, name, source.reader.shapes[f"{name}.weight"], stored, rotate_output=False)
        for name, stored in token_rows.items()
    }
    if not specs and not of_tokens:
        raise ValueError(f"no linear layer of {settings.model} is left to quantize: give a narrower --ignore")
    first = {} if embedding is None else {embedding: of_tokens.pop(embedding)}
    return Plan(first | specs | of_tokens, tuple(kept), head, embedding)


def with_split(settings: Settings, source: LayeredModel) -> Settings:
    """The settings with a number of chunks, where they name none: one of SPLITS, or 1 where no other fits the model.

    Raises:
        ValueError: as `make_plan`.
    """
    if settings.split is not None:
        return settings
    if any(source.mixtures(index) for index in range(len(source.layers))):  # shares of experts are not cut by chunks
        return replace(settings, split=1)
    rotated = {name: spec for name, spec in make_plan(settings, source).specs.items() if spec.rotate_output}
    heads = getattr(source.config.get_text_config(), "num_attention_heads", 0)

    def fits(ranks: int) -> bool:
        return heads % ranks == 0 and all(_chunks_fit(name, spec, ranks) for name, spec in rotated.items())

    return replace(settings, split=next(filter(fits, SPLITS), 1))


def _chunks_fit(name: str, spec: LinearSpec, ranks: int) -> bool:
    """Whether a layer has so many equal chunks along what vLLM cuts of it, and none is narrower than NARROWEST."""
    n, k = spec.out_features, spec.in_features
    try:
        stored = chunked(name, LayerFormat(spec.code, spec.bits), n, k, ranks)
    except ValueError:
        return False
    return min(n // stored.output_chunks, k // stored.input_chunks) >= NARROWEST or cut_of(name) is Cut.NOTHING


def _token_rows(
    settings: Settings, source: LayeredModel
) -> tuple[tuple[str | None, str | None], dict[str, LayerFormat]]:
    """Names of the quantized embedding that is not tied to the head, and of the quantized head; code and bits of both.

    Raises:
        ValueError: there is no such head, or one table would have two formats.
    """
    if settings.plan:
        rows = {name: dict(settings.plan).get(name) for name in (source.embedding_name, source.head_name) if name}
        stored = {name: one for name, one in rows.items() if one is not None}
        own = source.embedding_name if source.embedding_name in stored and not source.tied else None
        if source.head_name in stored:
            source.quantizable_head()
        return (own, source.head_name if source.head_name in stored else None), stored
    embedding, head = settings.embedding, settings.lm_head
    if source.tied:
        if None not in (embedding, head) and embedding != head:
            raise ValueError(
                f"--embedding is {embedding} and --lm-head is {head}, but {settings.model} ties the two to one weight: "
                "give both the same bits, or leave one away"
            )
        embedding, head = None, embedding if head is None else head
    names = None if embedding is None else source.embedding_name, None if head is None else source.quantizable_head()
    bits = zip(names, (embedding, head), strict=True)
    return names, {name: LayerFormat(settings.code, of) for name, of in bits if name is not None and of is not None}


def _check_planned(settings: Settings, source: LayeredModel) -> None:
    """Raises ValueError unless a plan names every linear layer of the decoder layers, and nothing that there is not."""
    inside = [name for index in range(len(source.layers)) for name in source.linears(index)]
    planned = dict(settings.plan)
    for name in planned:
        if name not in inside and name not in (source.embedding_name, source.head_name):
            raise ValueError(f"the plan names {name}, which {settings.model} has not: take it out of the plan")
    for name in inside if planned else []:
        if name not in planned:
            raise ValueError(
                f"the plan does not name {name}: give its code and bits there, or bits null to keep its weight"
            )


def _check_patterns(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"{option} {pattern} matches no linear layer: their names are like {names[0]}")


def _experts_in_one(mixture: Mixture, specs: Mapping[str, LinearSpec], kept: Sequence[str]) -> list[str]:
    """`kept` with the name of the mixture for all of its linear layers, where these keep their weights.

    Raises:
        ValueError: its experts are stored in different ways.
    """
    own = set(mixture.linears)
    if own.isdisjoint(specs):
        return [*(name for name in kept if name not in own), mixture.name]
    if not own <= specs.keys() or any(len({specs[name] for name in names}) > 1 for names in mixture.alike):
        raise ValueError(
            f"{mixture.name} has experts that differ in code and bits, or in what keeps its weight: vLLM serves "
            "all experts of a decoder layer together; give an --override that matches the same of each expert, and an "
            "--ignore that matches all of them or none"
        )
    return [*kept]


def _spec(
    settings: Settings, name: str, shape: tuple[int, ...], stored: LayerFormat, rotate_output: bool = True
) -> LinearSpec:
    n, k = shape
    spec = settings.spec(name, stored, n, k, rotate_output)
    problem = sizes_problem(spec)
    if problem is None and spec.padded and cut_of(name) is Cut.OUTPUTS:
        problem = (
            f"its {n} outputs have no Hadamard transform, and vLLM fuses it with others; give --hadamard-block "
            f"{block_size(n, n)}, or leave it out (--ignore)"
        )
    if problem is not None:
        raise ValueError(f"{name} cannot be quantized: {problem}")
    return spec
