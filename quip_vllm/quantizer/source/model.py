# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal LM whose weights are read one decoder layer at a time."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quip_vllm.checkpoint.hub import check_depth, load_config
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.ops.extension import usable_device
from quip_vllm.quantizer.source.architecture import check_kind, decoder_layers, empty_model
from quip_vllm.quantizer.source.mixture import Mixture, mixtures, routers
from quip_vllm.quantizer.source.names import modules_beyond, names_in_files
from quip_vllm.quantizer.source.replay import Calls, Returned, Stub, same


class _HeadReached(Exception):
    """Ends a forward pass at the output head."""


def fast_dtype(stored: torch.dtype | None, device: str = "cpu") -> torch.dtype:
    """What a model stored as `stored` runs in: bfloat16 where it is, unless the CPU has no such instructions."""
    bf16 = stored == torch.bfloat16 and (device != "cpu" or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if bf16 else torch.float32


class LayeredModel:
    """The model with every parameter on the meta device until it is asked for.

    All names of modules and tensors that it gives and takes are those of the model's files.

    Args:
        folder: config.json and safetensors files.
        trust_remote_code: whether Python code among the files may run.
        device: torch's name of where it runs.

    Attributes:
        layers: the decoder layers (the longest module list whose members hold nn.Linear).
        prefix: their name, for example ``model.layers``.
        other_linears: names of nn.Linear modules outside of them (lm_head).
        beyond: modules that have matrices in the files, but that the model does not have (layers that predict several
            tokens, a vision tower).
        outside: names of all tensors that belong to no decoder layer.
        head: the module of the output head, None where there is none.
        tied: whether its weight is that of the input embedding.
        embedding_name: of the input embedding.
        head_name: the embedding's name where tied, else the head's own.
        head_weights: names that its weight may have; some tied models store it under both.
        compute_dtype: of ``fast_dtype``.

    Raises:
        ValueError: the folder holds no model whose decoder layers can be quantized, or not all of its tensors.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False, device: str = "cpu"):
        self.device = usable_device(device)
        self.folder = folder
        self.config = load_config(folder, trust_remote_code)
        check_kind(folder, self.config)
        self.reader = CheckpointReader(folder)
        self.reader.check_floats()
        check_depth(self.config, self.reader.names())
        self.compute_dtype = fast_dtype(self.config.dtype, self.device.type)
        self.model = empty_model(folder, self.config, self.compute_dtype, trust_remote_code)
        for module in self.model.modules():
            module._buffers.update(
                {name: one.to(self.device) for name, one in module._buffers.items() if one is not None}
            )
        self._path, self.layers = decoder_layers(folder, self.model)
        self._names = names_in_files(self.model, self.reader)
        first = next(name for name in self._names if name.startswith(f"{self._path}.0."))
        self.prefix = self._names[first].partition(".0.")[0]
        begins = tuple(f"{self.prefix}.{index}." for index in range(len(self.layers)))
        inside = {name for index in range(len(self.layers)) for name, _ in self._tensors(index)}
        self.outside = [name for name in self.reader.names() if name not in inside and not name.startswith(begins)]
        self.other_linears = [
            self._module_name(name)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(self._path + ".")
        ]
        self.beyond = modules_beyond(self._names, self.reader, self.outside, self.prefix)
        self.head = self.model.get_output_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        self._head_path = own = names.get(self.head)
        self.tied = f"{own}.weight" in (getattr(self.model, "all_tied_weights_keys", None) or {})
        self._embedding_path = names[self.model.get_input_embeddings()]
        self.embedding_name = self._module_name(self._embedding_path)
        self.head_name = self.embedding_name if self.tied else None if own is None else self._module_name(own)
        self.head_weights = {f"{self.head_name}.weight", self._names.get(f"{own}.weight", f"{own}.weight")}
        self._returned = Returned()
        self.layers[0].register_forward_hook(self._returned.see)

    @property
    def vocabulary(self) -> int:
        """The model knows the tokens below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Module name -> linear layer of decoder layer ``index``, without `routers`."""
        modules = self.layers[index].named_modules(prefix=f"{self._path}.{index}")
        linears = {self._module_name(name): module for name, module in modules if isinstance(module, nn.Linear)}
        kept = set(self.routers(index))
        return {name: module for name, module in linears.items() if name not in kept}

    def routers(self, index: int) -> list[str]:
        """Names of the matrices of decoder layer ``index`` that choose experts or weigh them."""
        return [self._module_name(f"{self._path}.{index}.{path}") for path in routers(self.layers[index])]

    def mixtures(self, index: int) -> list[Mixture]:
        """The mixtures of experts of decoder layer ``index``."""
        return mixtures(self.layers[index], lambda path: self._module_name(f"{self._path}.{index}.{path}"))

    def layer_names(self, index: int) -> list[str]:
        """Names of the tensors of decoder layer ``index``, those included that the model does not read."""
        names = [name for name, _ in self._tensors(index)]
        begin = f"{self.prefix}.{index}."
        return [*names, *sorted({name for name in self.reader.names() if name.startswith(begin)} - set(names))]

    def vectors(self, index: int) -> dict[str, str]:
        """Name in the files -> name inside of it, of the parameters of decoder layer ``index`` that are vectors."""
        parameters = dict(self.layers[index].named_parameters())
        return {
            name: inside
            for name, inside in self._tensors(index)
            if inside in parameters and parameters[inside].dim() == 1
        }

    def outer_vectors(self) -> dict[str, nn.Parameter]:
        """Name in the files -> parameter, of the vectors outside the decoder layers and the output head."""
        inside = (f"{self._path}.", f"{self._head_path}.")
        return {
            self._names[name]: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.dim() == 1 and name in self._names and not name.startswith(inside)
        }

    def stored_dtype(self) -> str:
        """The dtype of the first layer's weights, as config.json names it."""
        return str(self.reader.dtypes[self._tensors(0)[0][0]]).removeprefix("torch.")

    @contextlib.contextmanager
    def layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Decoder layer ``index`` in ``compute_dtype``; its memory is given back when the block ends.

        Args:
            index: of the layer.
            tensors: its tensors by name. None reads the model's own, one at a time.
        """
        layer = self.layers[index]
        for name, inside in self._tensors(index):
            tensor = self.reader.read([name])[name] if tensors is None else tensors[name]
            _set_tensor(layer, inside, tensor.to(self.device), self.compute_dtype)
        try:
            yield layer
        finally:
            for name, old in list(layer.named_parameters()):
                _set_tensor(layer, name, torch.empty_like(old, device="meta"), old.dtype)

    def run_others(self, tokens: Tensor, real: int | None = None) -> list[Stub]:
        """Runs all but the decoder layers, or all but the others than `real`; returns the stubs.

        The stub of `real`, which did not run, has that layer's output as its ``hidden``.
        """
        self.read_others()
        with self._stubs(real) as stubs, contextlib.ExitStack() as hooks:
            if real is not None:

                def keep(_: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
                    stubs[real].hidden = out[0] if isinstance(out, tuple) else out

                hooks.callback(self.layers[real].register_forward_hook(keep).remove)
            self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        return stubs

    def first_hidden_states(self, tokens: Tensor, batch: int) -> tuple[list[Tensor], list[Calls]]:
        """Runs all but the decoder layers.

        Args:
            tokens: int64 [count, length].
            batch: sequences at a time.

        Returns:
            (hidden states before layer 0, [batch, length, hidden] each; the calls of each layer).
        """
        hidden: list[Tensor] = []
        calls: list[Calls] = [{} for _ in self.layers]
        for chunk in tokens.split(batch):
            stubs = self.run_others(chunk)
            known: set[tuple[int, int]] = set()
            hidden.append(stubs[0].hidden.clone())
            for stub, of_layer in zip(stubs, calls, strict=True):
                if not same(of_layer.setdefault(len(chunk), stub.call), stub.call, known):
                    raise ValueError(
                        f"{self.folder}: its decoder layers read more of the text than their hidden states"
                    )
        return hidden, calls

    def set_embedding(self, weight: Tensor) -> None:
        """Gives the input embedding another weight, [vocabulary, width], for the hidden states before layer 0."""
        _set_tensor(self.model, f"{self._embedding_path}.weight", weight.to(self.device), self.compute_dtype)

    def quantizable_head(self) -> str:
        """Name of the output head. Raises ValueError if it cannot be quantized."""
        if self.head is None or self.head_name is None or f"{self.head_name}.weight" not in self.reader:
            raise ValueError(f"{self.folder} has no output head: leave --lm-head away")
        return self.head_name

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
                        self.model(input_ids=chunk.to(self.device), use_cache=False)
                    if not seen or seen[-1].shape[:-1] != states.shape[:-1]:
                        raise ValueError(
                            f"{self.head_name} is not called with one vector a token: the output head of this "
                            "architecture cannot be quantized; leave --lm-head away"
                        )
                    yield seen.pop()
        finally:
            handle.remove()

    @contextlib.contextmanager
    def output_head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """f(outputs of the last decoder layer, [batch, tokens, hidden]) -> logits [batch, tokens, vocabulary].

        What the model does behind its decoder layers, with autograd where it is enabled. The head's weight is in memory
        until the block ends.
        """
        self.read_others()
        for name, _ in self.head.named_parameters():
            weight = self.head_weights if name == "weight" else {self._names[f"{self._head_path}.{name}"]}
            stored = next(one for one in sorted(weight) if one in self.reader)
            _set_tensor(self.head, name, self.reader.read([stored])[stored].to(self.device), self.compute_dtype)
        try:
            with self._stubs() as stubs:

                def logits(states: Tensor) -> Tensor:
                    stubs[0].output = states
                    zeros = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
                    out: Tensor = self.model(input_ids=zeros, use_cache=False).logits
                    return out

                yield logits
        finally:
            for name, old in list(self.head.named_parameters()):
                _set_tensor(self.head, name, torch.empty_like(old, device="meta"), old.dtype)

    def read_others(self) -> None:
        """Reads what is outside the decoder layers, the output head excepted."""
        for name, old in list(self.model.named_parameters()):
            if (
                old.device.type == "meta"
                and not name.startswith(self._path + ".")
                and not name.startswith(f"{self._head_path}.")
            ):
                stored = self._names[name]
                _set_tensor(self.model, name, self.reader.read([stored])[stored].to(self.device), self.compute_dtype)

    @contextlib.contextmanager
    def _stubs(self, real: int | None = None) -> Iterator[list[Stub]]:
        """Stubs in place of the decoder layers, `real` excepted."""
        parent_name, _, list_name = self._path.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        stubs = [Stub(layer, self._returned) for layer in self.layers]
        placed = [self.layers[i] if i == real else stub for i, stub in enumerate(stubs)]
        setattr(parent, list_name, nn.ModuleList(placed))
        try:
            yield stubs
        finally:
            setattr(parent, list_name, self.layers)

    def _tensors(self, index: int) -> list[tuple[str, str]]:
        """(name in the files, name inside the layer) of the parameters and buffers of decoder layer ``index``."""
        begin = f"{self._path}.{index}."
        full = [name for name in self.layers[index].state_dict(prefix=begin) if name in self._names]
        return [(self._names[name], name.removeprefix(begin)) for name in full]

    def _module_name(self, path: str) -> str:
        """The name in the files of the linear layer or embedding at `path`."""
        return self._names.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")


def _set_tensor(module: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Puts a value in the place of a parameter, in `dtype`, or of a buffer, in the dtype that it has."""
    owner, _, leaf = name.rpartition(".")
    holder = module.get_submodule(owner)
    buffer = holder._buffers.get(leaf)
    if buffer is not None:
        holder._buffers[leaf] = value.to(buffer.dtype)
    else:
        holder._parameters[leaf] = nn.Parameter(value.to(dtype), requires_grad=False)
