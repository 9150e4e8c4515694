# SPDX-License-Identifier: Apache-2.0
"""What is trained: su, sv, norms and biases of a decoder layer, or su and sv of token rows, over dense weights."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SU, SV, tensor_specs
from quip_vllm.ops import dequantize
from quip_vllm.quantizer.source.model import LayeredModel


class Vectors:
    """Vectors that are trained in float32, and compute as they will be stored.

    Attributes:
        vectors: full name -> float32, a leaf that wants a gradient.
    """

    def __init__(self, source: LayeredModel):
        self._source = source
        self._dtypes: dict[str, torch.dtype] = {}
        self.vectors: dict[str, Tensor] = {}

    def stored(self) -> dict[str, Tensor]:
        """The vectors by full name, as they are stored."""
        return {name: vector.detach().to(self._dtypes[name]).cpu() for name, vector in self.vectors.items()}

    def _train(self, name: str, stored: Tensor) -> None:
        self.vectors[name] = stored.float().clone().to(self._source.device).requires_grad_()
        self._dtypes[name] = stored.dtype

    def _stored(self, name: str) -> Tensor:
        return self.vectors[name].to(self._dtypes[name]).to(self._source.compute_dtype)

    def _dense(self, name: str, spec: LinearSpec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Takes a quantized layer out of `tensors`: U_n What U_k^T, su and sv."""
        own = {one.name: tensors.pop(f"{name}.{one.name}").to(self._source.device) for one in tensor_specs(spec)}
        su, sv = own[SU.name], own[SV.name]
        dense = dequantize(spec, own | {SU.name: torch.ones_like(su), SV.name: torch.ones_like(sv)})
        return dense.to(self._source.compute_dtype), su, sv


class Block(Vectors):
    """The trained vectors of one quantized decoder layer, and the layer that computes with them.

    Neither a code is decoded nor a rotation done while it runs: y = sv * A(su * x) with A = U_n What U_k^T, made once.
    Linear layers that share su have one vector for all.

    Args:
        source: the model.
        index: of the layer.
        specs: full module name -> format, of the quantized layers.
        tensors: the layer's tensors as they are stored, by full name.

    Attributes:
        weights: a function that gives the layer's other tensors, with A in `compute_dtype` as the ``weight`` of a
            quantized layer. It may be replaced by one that reads them from where they take no memory.
    """

    weights: Callable[[], Mapping[str, Tensor]]

    def __init__(
        self, source: LayeredModel, index: int, specs: Mapping[str, LinearSpec], tensors: Mapping[str, Tensor]
    ):
        super().__init__(source)
        self._index = index
        self._linears = {name: module for name, module in source.linears(index).items() if name in specs}
        self._inside = source.vectors(index)
        weights = dict(tensors)
        for name in self._inside:
            self._train(name, weights[name])
        shared: list[tuple[Tensor, str]] = []
        for name in self._linears:
            dense, su, sv = self._dense(name, specs[name], weights)
            weights[f"{name}.weight"] = dense
            first = next((first for one, first in shared if torch.equal(one, su)), None)
            if first is None:
                shared.append((su, first := f"{name}.{SU.name}"))
                self._train(first, su)
            self.vectors[f"{name}.{SU.name}"], self._dtypes[f"{name}.{SU.name}"] = self.vectors[first], su.dtype
            self._train(f"{name}.{SV.name}", sv)
        self.weights = lambda: weights

    @contextlib.contextmanager
    def layer(self) -> Iterator[nn.Module]:
        """The layer, called like the model's own; it computes with the vectors as they would be stored."""
        with self._source.layer(self._index, self.weights()) as layer:
            for name, module in self._linears.items():
                module.forward = self._forward(name, module)  # type: ignore[method-assign, assignment]
            try:
                yield _Called(layer, lambda: {inside: self._stored(name) for name, inside in self._inside.items()})
            finally:
                for module in self._linears.values():
                    del module.forward

    def _forward(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            su, sv = self._stored(f"{name}.{SU.name}"), self._stored(f"{name}.{SV.name}")[: module.out_features]
            y = Product.apply(x, module.weight, su, sv)
            return y if module.bias is None else y + module.bias

        return forward


class TokenRows(Vectors):
    """The trained vectors of a quantized output head, input embedding, or of both in one.

    Args:
        name: full module name.
        spec: its format.
        tensors: its tensors as they are stored, by full name.
        source: the model. The dense matrix of the codes, [vocabulary, k] in its dtype, stays in memory.
    """

    def __init__(self, name: str, spec: LinearSpec, tensors: Mapping[str, Tensor], source: LayeredModel):
        super().__init__(source)
        dense, su, sv = self._dense(name, spec, dict(tensors))
        self._matrix = dense
        self._su, self._sv = f"{name}.{SU.name}", f"{name}.{SV.name}"
        self._train(self._su, su)
        self._train(self._sv, sv)

    @property
    def scales(self) -> Tensor:
        """sv, an element a token."""
        return self.vectors[self._sv]

    def weight(self) -> Tensor:
        """[vocabulary, k], with autograd where it is enabled."""
        return Scaled.apply(self._matrix, self._stored(self._su), self._stored(self._sv))

    def logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Those of x [..., k], float32 [..., vocabulary]."""
        y = linear(x * self._stored(self._su), self._matrix).float() * self._stored(self._sv).float()
        return y if bias is None else y + bias.float()


class Scaled(torch.autograd.Function):
    """diag(sv) A diag(su), with gradients of su and sv that take one pass over A and two products with a vector."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, su: Tensor, sv: Tensor) -> Tensor:
        """[n, k] of a matrix [n, k], su [k] and sv [n]."""
        ctx.save_for_backward(matrix, su, sv)
        return _scaled(matrix, su, sv)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        """The gradients of su and sv."""
        matrix, su, sv = ctx.saved_tensors
        product = gradient * matrix
        return None, product.T.mv(sv), product.mv(su)


class Product(torch.autograd.Function):
    """x (diag(sv) A diag(su))^T, with gradients of x, su and sv that do without the one of the weight.

    With g = dloss/dy, they are dloss/dsv = sum g y / sv and dloss/dsu = sum x dloss/dx / su, over all tokens. The
    gradient of an element that is 0 is 0 here: it stays.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, su: Tensor, sv: Tensor) -> Tensor:
        """[..., n] of x [..., k], a matrix [n, k], su [k] and sv [n]."""
        weight = _scaled(matrix, su, sv)
        y = linear(x, weight)
        ctx.save_for_backward(x, y, weight, su, sv)
        return y.clone()  # Falcon adds to it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        """The gradients of x, su and sv."""
        x, y, weight, su, sv = ctx.saved_tensors
        below = gradient @ weight
        return below, None, _over_tokens(x * below, su), _over_tokens(gradient * y, sv)


def _scaled(matrix: Tensor, su: Tensor, sv: Tensor) -> Tensor:
    return (matrix * su).mul_(sv[:, None])


def _over_tokens(products: Tensor, vector: Tensor) -> Tensor:
    """The sum over all dimensions but the last, divided by a vector; 0 where that is 0."""
    total = products.flatten(0, -2).sum(0, dtype=torch.promote_types(products.dtype, torch.float32))
    return torch.where(vector == 0, 0.0, total / vector).to(vector.dtype)


class _Called(nn.Module):
    """A layer that is called with the vectors of the moment in place of its own."""

    def __init__(self, layer: nn.Module, vectors: Callable[[], dict[str, Tensor]]):
        super().__init__()
        self._layer, self._vectors = layer, vectors

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102  # torch's
        return functional_call(self._layer, self._vectors(), args, kwargs)
