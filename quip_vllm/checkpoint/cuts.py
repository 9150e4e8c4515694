# SPDX-License-Identifier: Apache-2.0
"""Which side of a linear layer tensor parallelism cuts, by the last part of the layer's name."""

import enum
import re

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.transforms.hadamard import factor


class Cut(enum.Enum):
    """What a rank's share of a layer is a share of."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"
    NOTHING = "nothing"
    """Every rank holds the whole layer."""
    JOINED = "outputs of several layers"
    """Each of them is cut, but the model stores them as one."""
    REARRANGED = "rearranged outputs"
    """The same, with rows that vLLM moves while it loads them."""


_CUTS = {
    Cut.OUTPUTS: (
        *("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3"),
        *("fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    ),
    Cut.INPUTS: ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2", "wo"),
    Cut.NOTHING: ("q_a_proj", "kv_a_proj_with_mqa", "fc1_latent_proj", "fc2_latent_proj"),
    Cut.JOINED: ("qkv_proj", "gate_up_proj"),
    Cut.REARRANGED: ("query_key_value",),
}
_OF = {leaf: cut for cut, leaves in _CUTS.items() for leaf in leaves}


def cut_of(name: str) -> Cut | None:
    """What is cut of the layer ``name``, a full name or the last part of one; None where that is not known."""
    return _OF.get(name.rpartition(".")[2])


def kind_of(name: str) -> str:
    """The name with a star in place of each number: equal for the layers of one kind."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def chunked(name: str, stored: LayerFormat, n: int, k: int, ranks: int) -> LayerFormat:
    """The format of a layer [n, k] whose rotation acts on each of ``ranks`` chunks of the side that is cut, one by one.

    Raises:
        ValueError: there are no such chunks, or it is not known how the layer is cut.
    """
    cut = cut_of(name)
    try:
        if cut is Cut.NOTHING:
            return stored
        if cut not in (Cut.OUTPUTS, Cut.INPUTS):
            known = "a layer of a kind that is not known here" if cut is None else cut.value
            raise ValueError(f"equal chunks do not cut {known} as vLLM does; give --hadamard-block 128 instead")
        size = n if cut is Cut.OUTPUTS else k
        if size % ranks:
            raise ValueError(f"its {cut.value} of size {size} have no {ranks} equal chunks; give another number")
        factor(size // ranks)
        inputs, outputs = (k, n // ranks) if cut is Cut.OUTPUTS else (k // ranks, n)
        stored.spec(inputs, (outputs,), None).check_sizes()
    except ValueError as error:
        raise ValueError(f"{name} cannot be split for {ranks} ranks: {error}") from None
    return stored._replace(output_chunks=ranks) if cut is Cut.OUTPUTS else stored._replace(input_chunks=ranks)
