# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the model itself writes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quip_vllm.checkpoint.hub import check_token, load_config, load_tokenizer
from quip_vllm.quantizer.settings import Settings
from quip_vllm.quantizer.source.documents import bundled_documents, document_ids
from quip_vllm.quantizer.source.model import fast_dtype

DRAWN, LIKELIEST = -1, -2
"""In what `beginnings` gives: a token that is drawn as the model has it, and the token that it finds likeliest."""
GREEDY = 3
"""How many likeliest tokens follow a first one that was drawn among all: they find a text which that can begin."""
COOL = 0.5
"""Temperature of a quarter of the sequences; that of the others is 1."""


@torch.no_grad()
def self_written(settings: Settings, folder: Path, vocabulary: int) -> Tensor:
    """Text the model writes from many beginnings (docs/quantizer.md); needs the whole model in memory.

    Args:
        settings: sequences, sequence_length and seed.
        folder: the model's.
        vocabulary: the model knows the tokens below it.

    Returns:
        int64 [sequences, sequence_length].

    Raises:
        ValueError: its tokenizer is not the model's, its chat template cannot be applied, or its logits are not finite.
    """
    from transformers import AutoModelForCausalLM

    trust = settings.trust_remote_code
    generator = torch.Generator().manual_seed(settings.seed)
    count, length = settings.sequences, settings.sequence_length
    begun = beginnings(load_tokenizer(folder, trust), count, length, vocabulary, generator)
    check_token(folder, int(begun.max()), vocabulary)
    dtype = fast_dtype(load_config(folder, trust).dtype)
    load = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust).eval()
    prepack(model, count)
    temperature = torch.where(torch.arange(count) % 8 < 6, 1.0, COOL)[:, None]
    tokens, cache = begun[:, :1], None
    for given in tqdm(begun[:, 1:].split(1, 1), desc="the model writes its calibration text", unit="token"):
        out = model(tokens[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        if cache is None:
            cache = out.past_key_values
            reserve(cache, length)
        logits = out.logits[:, -1].float()
        # torch.multinomial would draw a random number for each token of the vocabulary.
        sums = (logits / temperature).softmax(-1).cumsum(-1)
        if not torch.isfinite(sums[:, -1]).all():
            raise ValueError("the model's logits hold a NaN or an infinity: mend its weights")
        drawn = torch.rand(count, 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
        latest = torch.searchsorted(sums, drawn.float(), right=True)
        latest.clamp_(max=sums.shape[-1] - 1)  # rounded to float32, a draw can reach the last sum
        latest = torch.where(given == LIKELIEST, logits.argmax(-1, keepdim=True), latest)
        tokens = torch.cat([tokens, torch.where(given >= 0, given, latest)], dim=1)
    return tokens


def beginnings(tokenizer: Any, count: int, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """How sequences begin: with some tokens, then LIKELIEST ones, then DRAWN ones to their ends.

    Every other sequence is a question of the bundle's dialogues in the chat template, if there is one. The others begin
    with the tokenizer's start token, if it has one, and a token drawn evenly among all that are not special, as LLM-QAT
    does (arXiv 2305.17888), so that they are of many kinds and languages.

    Returns:
        int64 [count, length].
    """
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    usual = [token for token in range(min(vocabulary, len(tokenizer))) if token not in added]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    dialogues = [document for document in bundled_documents() if not isinstance(document, str)]
    asked = torch.randperm(len(dialogues), generator=generator).tolist()
    begun = torch.full((count, length), DRAWN)
    for i, row in enumerate(begun):
        if tokenizer.chat_template and i % 2:
            ids = document_ids(tokenizer, dialogues[asked[i // 2 % len(asked)]][:1])[: max(length // 2, 1)]
        else:
            drawn = usual[int(torch.randint(len(usual), (), generator=generator))]
            ids = [*first, drawn, *[LIKELIEST] * GREEDY][:length]
        row[: len(ids)] = torch.tensor(ids)
    return begun


def reserve(cache: Any, length: int) -> None:
    """Gives a cache of transformers that holds a text's first tokens the memory for `length` tokens.

    Its own DynamicLayer copies all keys and values of the text so far for each new token: a quarter of the time. Layers
    and caches of other kinds stay as they are.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Reserved(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            begin, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
            if begin == 0:
                self.lazy_initialization(key_states, value_states)
                self.memory = [x.new_empty(*x.shape[:-2], length, x.shape[-1]) for x in (key_states, value_states)]
            for memory, states in zip(self.memory, (key_states, value_states), strict=True):
                memory[..., begin:end, :] = states
            self.keys, self.values = (memory[..., :end, :] for memory in self.memory)
            return self.keys, self.values

    if type(cache) is not DynamicCache:
        return
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = Reserved()
            layers[i].update(layer.keys, layer.values)


def prepack(model: nn.Module, rows: int) -> None:
    """Lays the weights of a model's linear layers out once as oneDNN multiplies `rows` rows by them; for CPUs only.

    Otherwise each call does that again: a fifth of the time at 64 rows. Nothing else may read the weights afterwards.
    A torch without oneDNN leaves the model as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    multiply = partial(torch.ops.mkldnn._linear_pointwise, attr="none", scalars=[], algorithm="")
    for module in model.modules():
        if type(module) is nn.Linear:
            weight = torch.ops.mkldnn._reorder_linear_weight(module.weight, rows)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.forward = partial(multiply, W=weight, B=module.bias)  # type: ignore[method-assign]
