# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal LM whose weights are read one decoder layer at a time."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quip_vllm.checkpoint.store import CheckpointReader


class _HeadReached(Exception):
    """Ends a forward pass at the output head."""


class _Stub(nn.Module):
    """Stands in for a decoder layer: passes its input on, or ``output``, and keeps what it was called with."""

    def __init__(self, original: nn.Module, return_tuple: bool):
        super().__init__()
        self.seen: tuple[Tensor, dict[str, Any]] | None = None
        self.output: Tensor | None = None
        self.return_tuple = return_tuple
        for name in ("attention_type", "layer_type"):  # some models ask their layers which mask they want
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if args:
            raise ValueError(
                "this model passes positional arguments to its decoder layers, which quip_vllm cannot replay"
            )
        self.seen = (hidden_states, kwargs)
        out = hidden_states if self.output is None else self.output
        return (out,) if self.return_tuple else out


def fast_dtype(stored: torch.dtype | None) -> torch.dtype:
    """What a model stored as `stored` runs in: bfloat16 where both it and the CPU's instructions are, else float32."""
    bf16 = stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


class LayeredModel:
    """The model with every parameter on the meta device until it is asked for.

    Attributes:
        layers: the decoder layers (the longest module list whose members hold nn.Linear).
        prefix: their name in the checkpoint, for example ``model.layers``.
        other_linears: names of nn.Linear modules outside of them (lm_head).
        head: the module of the output head, None where there is none.
        tied: whether its weight is that of the input embedding.
        head_name: the embedding's name where tied, else the head's own.
        head_weights: names that its weight may have in the checkpoint; some tied models store it under both.
        compute_dtype: of ``fast_dtype``.
    """

    def __init__(self, folder: Path):
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder = folder
        self.reader = CheckpointReader(folder)
        try:
            self.config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds for a config.json that it does not understand
            raise ValueError(f"{folder / 'config.json'} cannot be used: {error}") from None
        if getattr(self.config, "quantization_config", None):
            raise ValueError(f"{folder} is quantized already: give the original bf16, fp16 or fp32 model")
        self.compute_dtype = fast_dtype(self.config.dtype)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=self.compute_dtype).eval()
        lists = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules())
        }
        if not lists:
            raise ValueError(
                f"{folder} has no list of decoder layers that hold nn.Linear: this architecture is not supported"
            )
        self.prefix, self.layers = max(lists.items(), key=lambda item: len(item[1]))
        inside = self.prefix + "."
        self.other_linears = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(inside)
        ]
        self.head = self.model.get_output_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        own = names.get(self.head)
        self.tied = f"{own}.weight" in (getattr(self.model, "all_tied_weights_keys", None) or {})
        self.head_name = names[self.model.get_input_embeddings()] if self.tied else own
        self.head_weights = {f"{self.head_name}.weight", f"{own}.weight"}
        self.layers[0].register_forward_hook(self._see_output)
        self._layers_return_tuples = False
        for i, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if parameter.dim() > 2:
                    raise ValueError(
                        f"{inside}{i}.{name} has {parameter.dim()} dimensions (stacked experts): only models whose "
                        "decoder layers hold plain nn.Linear are quantized"
                    )

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Full module name -> linear layer of decoder layer ``index``."""
        modules = self.layers[index].named_modules(prefix=f"{self.prefix}.{index}")
        return {name: module for name, module in modules if isinstance(module, nn.Linear)}

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """The checkpoint's tensors of decoder layer ``index``, by full name, in their own dtype."""
        names = [name for name, _ in self._parameters(index)]
        others = {name for name in self.reader.names() if name.startswith(f"{self.prefix}.{index}.")} - set(names)
        return self.reader.read([*names, *sorted(others)])

    def stored_dtype(self) -> str:
        """The dtype of the checkpoint's first layer, as config.json names it."""
        name = self._parameters(0)[0][0]
        return str(self.reader.read([name])[name].dtype).removeprefix("torch.")

    @contextlib.contextmanager
    def layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Decoder layer ``index`` in ``compute_dtype``; its memory is given back when the block ends.

        Args:
            index: of the layer.
            tensors: its parameters by full name. None reads the model's own, one at a time.
        """
        for name, inside in self._parameters(index):
            tensor = self.reader.read([name])[name] if tensors is None else tensors[name]
            _set_parameter(self.layers[index], inside, tensor.to(self.compute_dtype))
        try:
            yield self.layers[index]
        finally:
            for _, inside in self._parameters(index):
                old = self.layers[index].get_parameter(inside)
                _set_parameter(self.layers[index], inside, torch.empty_like(old, device="meta"))

    def _parameters(self, index: int) -> list[tuple[str, str]]:
        """(full name, name inside the layer) of the parameters of decoder layer ``index``."""
        names = [name for name, _ in self.layers[index].named_parameters()]
        return [(f"{self.prefix}.{index}.{name}", name) for name in names]

    def first_hidden_states(self, tokens: Tensor, batch: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Runs all but the decoder layers.

        Args:
            tokens: int64 [count, length].
            batch: sequences at a time.

        Returns:
            (hidden states before layer 0, [batch, length, hidden] each; keyword arguments of each layer, for full
            batches of the same shape).
        """
        base = self.model.base_model
        for name, _ in list(base.named_parameters()):
            if name.startswith(self.prefix.removeprefix(self.model.base_model_prefix + ".") + "."):
                continue
            full = f"{self.model.base_model_prefix}.{name}"
            source = full if full in self.reader else name
            _set_parameter(base, name, self.reader.read([source])[source].to(self.compute_dtype))
        hidden = []
        with self._stubs() as stubs:
            for chunk in tokens.split(batch):
                base(input_ids=chunk, use_cache=False)
                hidden.append(stubs[0].seen[0].clone())
        return hidden, [stub.seen[1] for stub in stubs]

    def quantizable_head(self) -> tuple[str, tuple[int, ...]]:
        """Name and shape [n, k] of the output head. Raises ValueError if it cannot be quantized."""
        if self.head is None or self.head_name is None:
            raise ValueError(f"{self.folder} has no output head: leave --lm-head away")
        if f"{self.head_name}.weight" not in self.reader:
            raise ValueError(
                f"{self.folder} has no tensor {self.head_name}.weight: its files name the output head otherwise than "
                "transformers does; leave --lm-head away"
            )
        return self.head_name, tuple(self.head.weight.shape)

    def head_inputs(self, tokens: Tensor, hidden: list[Tensor]) -> Iterator[Tensor]:
        """What the output head reads: runs what the model does after its decoder layers (the final norm).

        Args:
            tokens: int64 [count, length].
            hidden: outputs of the last decoder layer for all of ``tokens``, [batch, length, hidden] each.

        Yields:
            [batch, length, k], one for each of ``hidden``.

        Raises:
            ValueError: the model does not call its output head with one vector a token.
        """
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _HeadReached

        handle = self.head.register_forward_pre_hook(stop)
        try:
            with self._stubs() as stubs:
                for chunk, states in zip(tokens.split([x.shape[0] for x in hidden]), hidden, strict=True):
                    stubs[0].output = states
                    with contextlib.suppress(_HeadReached):
                        self.model(input_ids=chunk, use_cache=False)
                    if not seen or seen[-1].shape[:-1] != states.shape[:-1]:
                        raise ValueError(
                            f"{self.head_name} is not called with one vector a token: the output head of this "
                            "architecture cannot be quantized; leave --lm-head away"
                        )
                    yield seen.pop()
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[Any]:
        """Stubs in place of the decoder layers."""
        parent_name, _, list_name = self.prefix.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        stubs = nn.ModuleList(_Stub(layer, self._layers_return_tuples) for layer in self.layers)
        setattr(parent, list_name, stubs)
        try:
            yield stubs
        finally:
            setattr(parent, list_name, self.layers)

    def _see_output(self, _: nn.Module, args: Any, out: Any) -> None:
        self._layers_return_tuples = isinstance(out, tuple)


def run_layer(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One decoder layer's output hidden states; ``kwargs`` may be those of a batch of another size."""
    out = layer(hidden, **{key: _fit(value, hidden.shape[0]) for key, value in kwargs.items()})
    return out[0] if isinstance(out, tuple) else out


def _fit(value: Any, batch: int) -> Any:
    """A recorded argument for ``batch`` sequences: what has another number of rows repeats its first."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] != batch:
        return value[:1].expand(batch, *value.shape[1:])
    return tuple(_fit(one, batch) for one in value) if isinstance(value, tuple) else value


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    old = holder._parameters[leaf]
    if old is not None and tuple(old.shape) != tuple(value.shape):
        raise ValueError(
            f"tensor {name} is {tuple(value.shape)}: config.json makes it {tuple(old.shape)}; fetch the model again"
        )
    holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
