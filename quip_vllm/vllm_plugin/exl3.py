# SPDX-License-Identifier: Apache-2.0
"""EXL3 checkpoints in vLLM, served as they are: which layers, and a rank's share of each (docs/imports.md)."""

from typing import TYPE_CHECKING, Any

import torch

from quip_vllm.checkpoint.config import Head
from quip_vllm.checkpoint.exl3 import METHOD, Exl3Config, read, stored_format
from quip_vllm.checkpoint.hub import at_hand
from quip_vllm.checkpoint.published import HEAD
from quip_vllm.checkpoint.store import DTYPES, CheckpointReader, Header
from quip_vllm.vllm_plugin.config import DRAFT, QuipConfig, renaming

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper


class Exl3QuipConfig(QuipConfig):
    """``quantization_config`` of an EXL3 checkpoint; the layers are known once `maybe_update_config` has run."""

    checkpoint: Exl3Config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Exl3QuipConfig":
        """Keeps ``quantization_config``: what it says of layers is not to be trusted."""
        return cls(Exl3Config(stored_format("3inst", 1), raw=config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads the headers of the model's files, of a folder or of the hub.

        Raises:
            ValueError: there are none, or they are not those of an EXL3 checkpoint of this model.
        """
        if hf_config is None:
            raise ValueError(
                f"{METHOD} needs the model's config, which this version of vLLM does not give: upgrade vLLM"
            )
        model = {**hf_config.to_dict(), "quantization_config": self.checkpoint.raw}
        self.checkpoint = self.on_disk = read(model, _headers(model_name, revision))

    def described(self) -> dict[str, Any]:
        """The method alone: which tensors there are, and their shapes, say the rest."""
        return {"quant_method": self.checkpoint.raw.get("quant_method")}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """See QuipConfig."""
        self.checkpoint = self.checkpoint.renamed(renaming(hf_to_vllm_mapper))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> "QuantizeMethodBase | None":
        """See QuipConfig.

        Raises:
            ValueError: the layer is neither quantized nor dense in the files, or is stored in a way that is not served.
        """
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.linear import LinearBase

        config = get_current_vllm_config_or_none()
        if config is not None and self._has_head():  # a copy of its own, although the model may tie it to the embedding
            for model in (config.model_config.hf_config, config.model_config.hf_text_config):
                model.tie_word_embeddings = False
        if isinstance(layer, LinearBase):
            for name in self._names_on_disk(prefix.removeprefix(DRAFT)):
                if name not in self.checkpoint.dense and self._stored(name) is None:
                    raise ValueError(
                        f"{name} is not in the checkpoint, quantized or not: vLLM's model fuses what EXL3 stores "
                        "apart, which is not served yet"
                    )
        return super().get_quant_method(layer, prefix)

    def _has_head(self) -> bool:
        return any(name.rpartition(".")[2] == HEAD for name in self.checkpoint.layers)

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":  # type: ignore[override]  # static in vLLM
        """Leaves a quantized head out that is not used.

        Raises:
            ValueError: vLLM's model has built its head without asking for our method.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        mapper = super().get_checkpoint_weight_mapper()
        if self._has_head() and Head.KEY not in self._served:
            raise ValueError(f"{HEAD} is quantized, but vLLM's code of this model does not ask how it is stored")
        unused = self.on_disk.unused
        return mapper | WeightsMapper(orig_to_new_prefix={f"{name}.": None for name in unused}) if unused else mapper


def _headers(model: str, revision: str | None) -> dict[str, Header]:
    """Shape and dtype of every tensor of a folder, or of a model on the hub, whose files need not be here yet."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    folder = at_hand(model, revision)
    if folder is not None:
        return CheckpointReader(folder).headers()
    found = get_safetensors_params_metadata(model, revision=revision)
    found.pop("__metadata__", None)
    if not found or not {one["dtype"] for one in found.values()} <= set(DTYPES):
        raise ValueError(f"the headers of {model}'s safetensors files cannot be read: check the name and the network")
    return {name: Header(tuple(one["shape"]), DTYPES[one["dtype"]]) for name, one in found.items()}
