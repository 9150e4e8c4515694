# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks of a quantization method: which layers it serves, and how each is stored."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from quip_vllm.checkpoint import exl3
from quip_vllm.checkpoint.config import CheckpointConfig, Head, LayerFormat
from quip_vllm.checkpoint.hub import at_hand
from quip_vllm.checkpoint.layers import layer_specs
from quip_vllm.checkpoint.store import CheckpointReader

if TYPE_CHECKING:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.models.utils import WeightsMapper

MIN_CAPABILITY = 80
"""Compute capability of the oldest GPU the kernels support (Ampere)."""

DRAFT = "draft_model."
"""What vLLM puts in front of the names of all layers of a draft model."""

PREPARED = ("sharded_state", "runai_streamer_sharded", "ipc_cache", "tensorizer")
"""Load formats that fill layers with what they held in another process, past the model's code."""

SAFE = "*.safetensors"
PICKLES = ("pt", "npcache")
"""Load formats that read them."""

POSTPONED = "quip_postponed"
"""Marks what vLLM would have refused; see `postpone_refusal`."""

LATENT = "kv_b_proj"
"""The layer from whose weight vLLM computes the matrices of multi-head latent attention."""


class QuipConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint, as vLLM sees it; one class for every method.

    Attributes:
        checkpoint: the checked config, module names as in vLLM once `apply_vllm_mapper` has run.
        on_disk: the same, names as in the files.

    Raises:
        ValueError: there is no ``quantization_config``.
    """

    def __init__(self, checkpoint: CheckpointConfig | None = None) -> None:
        super().__init__()
        if checkpoint is None:  # what vLLM asks of a method that it knows from --quantization only
            raise ValueError(
                "--quantization names a method of quip_vllm, but the model's config.json has no quantization_config: "
                "quantize it first (quip-vllm quantize MODEL OUT), or leave --quantization out"
            )
        self.checkpoint = self.on_disk = checkpoint
        self._described = checkpoint.to_dict()
        self._served: set[str] = set()  # keys of config.json's embedding and head
        self._carries = False

    def get_name(self) -> str:  # type: ignore[override]  # vLLM lists its own names
        """The method's name, ``quant_method`` of config.json."""
        return self.checkpoint.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the activations."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Oldest compute capability of a GPU."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file besides config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuipConfig":
        """Reads ``quantization_config``.

        Raises:
            ValueError: something in it is unknown, ill-typed or out of range.
        """
        return cls(CheckpointConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks the headers of the files before vLLM reads them, where they are here.

        Files of a hub name that vLLM has yet to fetch are checked when they are here, and a dummy load needs none.

        Raises:
            ValueError: see `check_files`.
        """
        self.check_files(at_hand(model_name, revision))

    def check_files(self, folder: Path | None) -> None:
        """Checks the headers of the files in a folder, if there are any.

        Raises:
            ValueError: a file is truncated or damaged, or its tensors are not those that config.json describes.
        """
        if folder is None:
            return
        for file in folder.glob("consolidated*.safetensors"):
            raise ValueError(f"{file} would be read in place of the checkpoint beside it: remove it")
        if any(folder.glob(SAFE)):
            layer_specs(CheckpointReader(folder), self.on_disk)

    def described(self) -> dict[str, Any]:
        """What config.json says of the formats, names as in Hugging Face's model."""
        return self._described

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Renames the modules that the config names from Hugging Face's names to vLLM's."""
        rename = renaming(hf_to_vllm_mapper)
        head, embedding = self.checkpoint.head, self.checkpoint.embedding
        self.checkpoint = replace(
            self.checkpoint,
            head=head and replace(head, module=rename(head.module)),
            embedding=embedding and replace(embedding, module=rename(embedding.module)),
            modules_to_not_convert=tuple(map(rename, self.checkpoint.modules_to_not_convert)),
            layers={rename(name): stored for name, stored in self.checkpoint.layers.items()},
            shapes={rename(name): shape for name, shape in self.checkpoint.shapes.items()},
            parts={rename(name): parts for name, parts in self.checkpoint.parts.items()},
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Chooses the method of one layer.

        Args:
            layer: the layer under construction.
            prefix: its name in the vLLM model.

        Returns:
            Ours for a quantized linear layer, vLLM's own for an unquantized one; ours for quantized experts, and for
            the output head and the embedding that the checkpoint names; None for every other layer, so that experts,
            embeddings and head otherwise keep their ordinary weight.

        Raises:
            ValueError: vLLM does not multiply with the layer as with a linear layer, or its experts cannot be served.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from quip_vllm.vllm_plugin.linear_method import QuipLinearMethod
        from quip_vllm.vllm_plugin.moe_method import QuipExpertsMethod, expert_formats, names_of

        prefix = prefix.removeprefix(DRAFT)
        self._carry_tensors()
        if isinstance(layer, RoutedExperts):
            formats = expert_formats(layer, prefix, self._stored, names_of(layer))
            if formats is not None:
                return QuipExpertsMethod(self.checkpoint, layer, prefix, formats)
            if getattr(layer.moe_config, POSTPONED, False):
                raise ValueError(
                    f"{prefix} has experts without a gate, which vLLM does not run on this device with an ordinary "
                    "weight: requantize without --ignore of the experts"
                )
            return None
        if isinstance(layer, VocabParallelEmbedding):
            return self._head_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        names = self._names_on_disk(prefix)
        stored = tuple(map(self._stored, names))
        if not any(stored):
            return UnquantizedLinearMethod()
        config = get_current_vllm_config_or_none()
        if prefix.rpartition(".")[2] == LATENT and config is not None and config.model_config.use_mla:
            raise ValueError(
                f"{prefix} is quantized, but vLLM's latent attention (MLA) multiplies by its dense weight: requantize "
                f"with --ignore {LATENT}"
            )
        return QuipLinearMethod(self.checkpoint, prefix, names, stored)

    def _carry_tensors(self) -> None:
        """Prepares vLLM's classes: see `carry_tensors`, for those of the model and of a draft, and `postpone_refusal`.

        Raises:
            ValueError: the load format leaves the model's code out.
        """
        from vllm.model_executor.layers.fused_moe import FusedMoEConfig
        from vllm.model_executor.model_loader.utils import get_model_cls

        from quip_vllm.vllm_plugin.arrival import carry_tensors

        config = get_current_vllm_config_or_none()
        if self._carries or config is None:
            return
        if config.load_config.load_format in PREPARED:
            raise ValueError(
                f"--load-format {config.load_config.load_format} is not served for {self.get_name()}: it holds layers "
                "as they are prepared for one backend; serve the checkpoint that quip-vllm has written, without it"
            )
        if config.load_config.load_format in PICKLES:
            raise ValueError(
                f"--load-format {config.load_config.load_format} reads pickles, which can run any code: serve the "
                "checkpoint's safetensors files, without it"
            )
        folder = None if config.model_config is None else Path(config.model_config.model)
        if folder and config.load_config.load_format == "auto" and folder.is_dir() and not any(folder.glob(SAFE)):
            raise ValueError(f"{folder} has no {SAFE} file, and nothing else is read: quantize the model again")
        self._carries = True
        postpone_refusal(FusedMoEConfig)
        for described in (config.model_config, getattr(config.speculative_config, "draft_model_config", None)):
            if described is not None:
                carry_tensors(get_model_cls(described))

    def _head_method(self, layer: "VocabParallelEmbedding", prefix: str) -> QuantizeMethodBase | None:
        """Ours for the head and the embedding. Some models, Llama among them, give the embedding no name."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from quip_vllm.vllm_plugin.embedding_method import QuipEmbeddingMethod, RotatedHeadMethod

        head, is_output = self.checkpoint.head, isinstance(layer, ParallelLMHead)
        if is_output and prefix in self.checkpoint.layers:
            self._served.add(Head.KEY)
            return RotatedHeadMethod(self.checkpoint, Head(prefix, self.checkpoint.layers[prefix], tied=False))
        tied = head is not None and head.tied
        rows = head if is_output or tied else self.checkpoint.embedding
        if rows is None or not (is_output or prefix in ("", rows.module)):
            return None
        if not (is_output and tied):
            self._served.add(rows.KEY)
        return QuipEmbeddingMethod(self.checkpoint, rows)

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":  # type: ignore[override]  # static in vLLM
        """vLLM asks for it between building the model and loading its weights: the last chance for a clear message.

        Raises:
            ValueError: vLLM's model has built its head or embedding without asking for our method, or needs the dense
                rows of its head.
        """
        from vllm.distributed import get_pp_group

        from quip_vllm.vllm_plugin.embedding_method import unserved

        config = get_current_vllm_config_or_none()
        head = self.checkpoint.head
        if config is not None and head is not None and hasattr(config.model_config.hf_config, "classifier_from_token"):
            raise ValueError(
                f"{head.module} is quantized, but vLLM makes this reranker's scores from dense rows of the head: "
                f"requantize without {head.OPTION}"
            )
        for rows in self.checkpoint.token_rows:
            is_output = rows is self.checkpoint.head and not self.checkpoint.head.tied
            if rows.KEY not in self._served:
                group = get_pp_group()
                if group.is_last_rank if is_output else group.is_first_rank:
                    raise ValueError(unserved(rows))
        return super().get_checkpoint_weight_mapper()

    def _stored(self, name: str) -> LayerFormat | None:
        """How a linear layer is stored, of several slices the first; None if it keeps an ordinary weight."""
        found = exl3.slices(one for one in self.checkpoint.layers if one.startswith(f"{name}."))
        return self.checkpoint.layers[found[name][0]] if name in found else self.checkpoint.layer_format(name)

    def _names_on_disk(self, prefix: str) -> tuple[str, ...]:
        """Names on disk of the parts that vLLM fuses in this layer: q, k and v of qkv_proj."""
        parent, dot, leaf = prefix.rpartition(".")
        return tuple(parent + dot + name for name in self.packed_modules_mapping.get(leaf, [leaf]))


def postpone_refusal(config_class: Any) -> None:
    """Has vLLM build experts without a gate on a CPU, too, where a checkpoint of ours is served.

    The last of the checks of its FusedMoEConfig refuses them, since its own kernels do not run them there. For experts
    that keep their weight `QuipConfig.get_quant_method` does. Does nothing the second time.
    """
    check: Callable[[Any], None] = config_class.__post_init__
    if getattr(check, POSTPONED, False):
        return

    @wraps(check)
    def checked(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError:
            config = get_current_vllm_config_or_none()
            if self.is_act_and_mul or config is None or not isinstance(config.quant_config, QuipConfig):
                raise
            setattr(self, POSTPONED, True)

    setattr(checked, POSTPONED, True)
    config_class.__post_init__ = checked


def renaming(mapper: "WeightsMapper") -> Callable[[str], str]:
    """How a module's name in Hugging Face's model becomes vLLM's."""

    def rename(name: str) -> str:
        # Mappers are written for names of tensors: the prefix "model.visual." must also match module model.visual.
        mapped = mapper.apply_list([name])  # empty where the mapper drops the name
        if mapped == [name]:
            mapped = [one.removesuffix(".") for one in mapper.apply_list([name + "."])]
        return mapped[0] if mapped else name

    return rename
