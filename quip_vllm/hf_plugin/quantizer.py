# SPDX-License-Identifier: Apache-2.0
"""The quantization methods as transformers knows them: a config and a quantizer for each name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.hub import rules_of_transformers
from quip_vllm.checkpoint.layers import DAMAGED, layer_specs, others_of, read_config, stored_names
from quip_vllm.checkpoint.store import CheckpointReader, weight_map_of
from quip_vllm.formats.spec import LinearSpec, methods
from quip_vllm.formats.tensors import SU
from quip_vllm.hf_plugin.modules import Embedding, Linear, Sliced, StoredLayer, TiedHead
from quip_vllm.nn.experts import SHORT_LEAVES, experts_of, layout_of


class StoredConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json, as it is: the files of the checkpoint say the rest."""

    def __init__(self, **described: Any) -> None:
        self.quant_method = described["quant_method"]
        self._described = described

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return dict(self._described)


class Quantizer(HfQuantizer):
    """Puts a module that keeps its weight quantized in the place of every quantized layer, before weights are read."""

    requires_calibration = True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers, to adapters and to whatever comes before."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile sees operators with fake implementations."""
        return True

    def is_serializable(self, **_: Any) -> bool:
        """``save_pretrained`` writes the tensors that were read."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise ValueError("a quantized checkpoint is read from its files: give from_pretrained a folder or hub name")
        stored = Files(_folder_of(checkpoint_files, model.config._name_or_path))
        renamed = rules_of_transformers(model)
        paths = {name: renamed(f"{name}.{SU.name}")[0].removesuffix(f".{SU.name}") for name in stored.specs}
        for path, module in list(model.named_modules()):
            if layout := layout_of(module):
                for leaves in (layout.leaves, SHORT_LEAVES):
                    if f"{path}.0.{leaves[0]}" in paths.values():
                        model.set_submodule(path, experts_of(module, layout, leaves))
        modules = dict(model.named_modules())
        slices = exl3.slices(stored.specs)
        for name, path in paths.items():
            if not exl3.is_slice(name):
                model.set_submodule(path, stored.module(name, modules.get(path), model.dtype))
        for layer, names in slices.items():
            whole = exl3.joined(
                layer, [(stored.specs[name].out_features, stored.specs[name].in_features) for name in names]
            )
            original = modules.get(layer)
            if not isinstance(original, nn.Linear) or original.weight.shape != whole:
                raise ValueError(
                    f"{layer} is in slices that make up {whole}, which is no layer of the model: {DAMAGED}"
                )
            cut = [stored.linear(name, None) for name in names]
            model.set_submodule(layer, Sliced(cut, exl3.cuts_inputs(layer)))
        head = stored.config.head
        if head is not None and head.tied:
            embedding = model.get_submodule(head.module)
            if not isinstance(embedding, Embedding):
                raise ValueError(f"head.module is {head.module!r}, which is no embedding of the model: {DAMAGED}")
            model.set_output_embeddings(TiedHead(embedding))
        left = dict(model.named_parameters(remove_duplicate=False))
        tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {one: other for one, other in tied.items() if one in left and other in left}
        mapped = {inside for name in stored.others() if (inside := renamed(name)[0]) != name}
        self._dtypes = {name: left[name].dtype for name in mapped & left.keys()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, dtype in self._dtypes.items():  # transformers keeps the files' dtype where it maps a name
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, StoredLayer):
                module.prepare()
        return model


def _folder_of(files: Sequence[str], model: str) -> Path:
    """The one folder of a checkpoint's files. Raises ValueError for pickles, and for files that are elsewhere."""
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{file} is no safetensors file, and nothing else is read: fetch or quantize the model again"
            )
    folder = Path(files[0]).parent
    for place in {folder, folder.parent, Path(model)}:
        if place.is_dir():
            weight_map_of(place)  # which refuses files of other folders
    return folder


class Files:
    """The quantized layers of a folder, as modules without values."""

    def __init__(self, folder: Path):
        self._folder, self._reader, self.config = folder, CheckpointReader(folder), read_config(folder)
        self.specs = layer_specs(self._reader, self.config)

    def module(self, name: str, original: nn.Module | None, dtype: torch.dtype) -> StoredLayer:
        """The layer `name` in the place of a module of the model, which computes in `dtype`.

        Raises:
            ValueError: the model has no such module, or transformers cannot run the layer.
        """
        if self.config.parts_of(name):
            raise ValueError(
                f"{self._folder} holds {name}, which is several layers of the model in one: serve it with vLLM, or "
                "measure it with quip-vllm evaluate; transformers cannot run it"
            )
        if isinstance(original, nn.Linear):
            return self.linear(name, original.bias)
        scale = getattr(original, "scalar_embed_scale", 1.0 if type(original) is nn.Embedding else None)
        if scale is None:
            kind = "no such module" if original is None else f"a {type(original).__name__}"
            raise ValueError(f"{self._folder} holds {name}, for which transformers' model has {kind}: {DAMAGED}")
        return Embedding(*self._stored(name), dtype=dtype, scale=scale)

    def others(self) -> list[str]:
        """Names of the tensors that belong to no quantized layer."""
        return others_of(self._reader, self.config, self.specs)

    def linear(self, name: str, bias: nn.Parameter | None) -> Linear:
        """The linear layer `name`."""
        shape = self._reader.shapes.get(f"{name}.bias")
        if bias is not None and shape is not None:  # EXL3's is padded
            bias = nn.Parameter(torch.empty(shape, dtype=bias.dtype, device="meta"))
        return Linear(*self._stored(name), bias=bias)

    def _stored(self, name: str) -> tuple[LinearSpec, dict[str, Tensor], Callable[[Mapping[str, Tensor]], Any]]:
        spec, reader = self.specs[name], self._reader
        buffers = {
            full.rpartition(".")[2]: torch.empty(reader.shapes[full], dtype=reader.dtypes[full], device="meta")
            for full in stored_names(reader, self.config, name, spec)
        }
        return spec, buffers, partial(self.config.tensors, name)


def register() -> None:
    """Makes the methods known to transformers; a second time changes nothing."""
    for method in (*methods(), exl3.METHOD):
        if method not in AUTO_QUANTIZER_MAPPING:
            register_quantization_config(method)(StoredConfig)
            register_quantizer(method)(Quantizer)
