# SPDX-License-Identifier: Apache-2.0
"""Quantized experts in vLLM: loaded by its own mapping, they compute what the weights of their tensors do."""

import importlib.util
from functools import partial
from types import SimpleNamespace

import exl3_files
import moe_files
import pytest
import torch
from numerics import SERVED_LOG_PROBABILITY
from served_layers import SENT, assert_close, dense, finish, quant_config, random_tensors, served_difference
from torch.nn.functional import gelu, silu
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.models import gpt_oss
from vllm.platforms import current_platform

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.formats.spec import TileOrder
from quip_vllm.vllm_plugin import config as plugin
from quip_vllm.vllm_plugin import moe_method
from quip_vllm.vllm_plugin.arrival import send

EXPERTS, HIDDEN, INNER = 3, 64, 48
NAMES = ("gate_proj", "down_proj", "up_proj")
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def routed(config, rank=0, size=1, shapes=SHAPES, names=NAMES, kind=RoutedExperts, held=None, **changes):
    """vLLM's RoutedExperts with what our method and its loader read, and our method's parameters.

    `held` are the experts of the rank; None for all.
    """
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    inner, hidden = next(iter(shapes.values()))
    moe = {
        "num_experts": EXPERTS,
        "num_logical_experts": EXPERTS,
        "hidden_dim": hidden,
        "hidden_dim_unpadded": hidden,
        "intermediate_size": inner,
        "intermediate_size_per_partition": inner // size,
        "tp_rank": rank,
        "tp_size": size,
        "moe_parallel_config": SimpleNamespace(use_ep=held is not None, dp_size=1, tp_rank=rank),
        "is_act_and_mul": names[2] is not None,
        "is_lora_enabled": False,
        "has_bias": False,
        "swiglu_limit": None,
    }
    layer.moe_config = SimpleNamespace(**{**moe, **{key: one for key, one in changes.items() if key in moe}})
    layer.layer_name = "m.experts"
    layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name = names
    layer.activation = changes.get("activation", MoEActivation.SILU)
    layer.apply_router_weight_on_input = changes.get("on_input", False)
    layer.lora_base_layer_prefix = ""
    layer._expert_map = None if held is None else torch.full((EXPERTS,), -1, dtype=torch.int32)
    if held is not None:
        layer._expert_map[held] = torch.arange(len(held), dtype=torch.int32)
    mapped = range(EXPERTS) if held is None else layer._expert_map.tolist()
    layer.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0, map_global_to_local=mapped.__getitem__)
    layer.params_dtype = torch.float32
    layer.quant_method = config.get_quant_method(layer, "m.experts")
    if layer.quant_method is not None:
        attributes = {"weight_loader": layer.weight_loader}
        count = EXPERTS if held is None else len(held)
        layer.quant_method.create_weights(layer, count, hidden, inner // size, torch.float32, **attributes)
    return layer


def random_experts(code="1mad", bits=2, seed=0, shapes=SHAPES):
    """Name on disk, without the layer's -> tensors."""
    return {
        f"{e}.{name}": random_tensors(code, bits, *shape, seed=seed + 10 * e + i)
        for e in range(EXPERTS)
        for i, (name, shape) in enumerate(shapes.items())
    }


def arrive(layer, experts, sizes=None):
    """What vLLM's code does with the numbers of the experts, in the order of the files."""
    for name, tensors in experts.items():
        size = (sizes or {}).get(name.rpartition(".")[2])
        loaded = list(layer.load_weights([(f"{name}.weight", send(f"m.experts.{name}", [tensors], SENT, size))]))
        assert len(loaded) == 1
    return layer


def inputs(rows=7, each=2, hidden=HIDDEN, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:each] for _ in range(rows)]).int()
    x = torch.randn(rows, hidden, generator=generator)
    return x, torch.rand(rows, each, generator=generator), ids


def apply(layer, x, weights, ids):
    return layer.quant_method.apply(layer, x, weights, ids, None, None)


def expected(weights, x, routing, ids, activation=silu, on_input=False, names=NAMES):
    """What the dense experts give; weights: name -> [n, k]."""
    gate, down, up = names
    y = torch.zeros_like(x)
    for row, (share, experts) in enumerate(zip(routing, ids, strict=True)):
        for weight, e in zip(share, experts.tolist(), strict=True):
            own = x[row] * weight if on_input else x[row]
            inner = activation(weights[f"{e}.{gate}"] @ own) * (weights[f"{e}.{up}"] @ own)
            y[row] += (1 if on_input else weight) * (weights[f"{e}.{down}"] @ inner)
    return y


def dense_experts(experts, code="1mad", bits=2, block=None):
    return {name: dense(tensors, code, bits, block) for name, tensors in experts.items()}


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(("code", "bits"), [("1mad", 2), ("e8p", 3), ("hyb", 4), ("grid", 3)])
def test_every_kind_of_format(code, bits, block):
    experts = random_experts(code, bits)
    layer = finish(arrive(routed(quant_config(code, bits, hadamard_block=block)), experts))
    assert [len(layer.quip_w13_weight), len(layer.quip_w2_weight)] == [1, 1]  # gate and up share su
    assert_close(apply(layer, *inputs()), expected(dense_experts(experts, code, bits, block), *inputs()))


@pytest.mark.parametrize(
    ("activation", "function"),
    [(MoEActivation.GELU, gelu), (MoEActivation.GELU_TANH, lambda x: gelu(x, approximate="tanh"))],
)
def test_activations(activation, function):
    experts = random_experts()
    layer = finish(arrive(routed(quant_config(), activation=activation), experts))
    assert_close(apply(layer, *inputs()), expected(dense_experts(experts), *inputs(), activation=function))


@pytest.mark.parametrize("each", [1, 2])
def test_weights_of_the_router_may_be_on_the_inputs(each):
    experts = random_experts()
    layer = finish(arrive(routed(quant_config(), on_input=True), experts))
    assert_close(apply(layer, *inputs(each=each)), expected(dense_experts(experts), *inputs(each=each), on_input=True))


def test_names_and_formats_of_matrices_may_differ():
    """Mixtral's names; up at another rate than gate."""
    names = ("w1", "w2", "w3")
    shapes = dict(zip(("w1", "w3", "w2"), SHAPES.values(), strict=True))
    rates = {name: ("1mad", 3 if name == "w3" else 2) for name in names}
    layers = {f"m.experts.{e}.{name}": rate for e in range(EXPERTS) for name, rate in rates.items()}
    experts = {}
    for e in range(EXPERTS):
        for name, shape in shapes.items():
            experts[f"{e}.{name}"] = random_tensors(*rates[name], *shape, seed=10 * e)
    layer = finish(arrive(routed(quant_config("e8p", 2, layers=layers), names=names), experts))
    assert len(layer.quip_w13_weight) == 2
    weights = {name: dense(one, *rates[name.partition(".")[2]]) for name, one in experts.items()}
    assert_close(apply(layer, *inputs()), expected(weights, *inputs(), names=names))


def test_gate_and_up_may_have_input_vectors_of_their_own():
    experts = random_experts()
    experts["1.up_proj"]["su"] = torch.linspace(-1, 1, HIDDEN).half()
    layer = finish(arrive(routed(quant_config()), experts))
    assert len(layer.quip_w13_weight) == 2
    assert_close(apply(layer, *inputs()), expected(dense_experts(experts), *inputs()))


def test_exl3_with_padded_sizes():
    shapes = {"gate_proj": (96, 160), "up_proj": (96, 160), "down_proj": (160, 96)}
    config = quant_config()
    stored = LayerFormat("mul1", 3, TileOrder.MMA_SWAPPED, padded_to=128)
    object.__setattr__(config.checkpoint, "default", stored)
    object.__setattr__(config.checkpoint, "hadamard_block", 128)
    experts, weights = {}, {}
    for e in range(EXPERTS):
        for i, (name, shape) in enumerate(shapes.items()):
            own, weights[f"{e}.{name}"] = exl3_files.quantized_layer(*shape, 3, "mul1", older=i == 1, seed=10 * e + i)
            experts[f"{e}.{name}"] = own
    layer = finish(arrive(routed(config, shapes=shapes), experts, shapes))
    assert_close(apply(layer, *inputs(hidden=160)), expected(weights, *inputs(hidden=160)))


@pytest.mark.parametrize("code", ["1mad", "e8p", "hyb"])
def test_the_sum_over_ranks_is_the_whole(code):
    shapes = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    experts = random_experts(code, shapes=shapes)
    parts = []
    for rank in range(3):
        layer = routed(quant_config(code, hadamard_block=16), rank, 3, shapes)
        parts.append(apply(finish(arrive(layer, experts)), *inputs()))
    assert_close(sum(parts), expected(dense_experts(experts, code, block=16), *inputs()))


@pytest.mark.parametrize("on_input", [False, True])
def test_the_sum_over_ranks_with_experts_of_their_own_is_the_whole(on_input):
    experts, parts, given = random_experts(), [], inputs()
    for held in ([2, 0], [1]):
        layer = routed(quant_config(), held=held, on_input=on_input)
        for name, tensors in experts.items():
            numbers = send(f"m.experts.{name}", [tensors], SENT)
            loaded = list(layer.load_weights([(f"{name}.weight", numbers)]))
            assert len(loaded) == (int(name[0]) in held)
        parts.append(apply(finish(layer), *given))
        assert len(layer.quip_w2_0_su) == len(held)
    assert_close(sum(parts), expected(dense_experts(experts), *given, on_input=on_input))


@pytest.mark.parametrize("ranks", [1, 3])
def test_gates_that_take_turns_with_ups(ranks):
    """GPT-OSS: one matrix for both, biases, clamped values; the sum over ranks is the whole."""
    tensors, biases, weights = {}, {}, {}
    for e in range(EXPERTS):
        for i, (name, shape) in enumerate({"w13_weight": (192, 64), "w2_weight": (64, 96)}.items()):
            tensors[f"{e}.{name}"] = random_tensors("1mad", 2, *shape, seed=10 * e + i)
            weights[f"{e}.{name}"] = dense(tensors[f"{e}.{name}"], "1mad", 2, 16)
            biases[f"{e}.{name}"] = torch.linspace(-9, 9, shape[0])[torch.randperm(shape[0])]
    parts, (x, routing, ids) = [], inputs()
    for rank in range(ranks):
        shapes, kind = {"gate_proj": (96, 64)}, gpt_oss.GptOssRoutedExperts
        options = {"has_bias": True, "activation": MoEActivation.SWIGLUOAI}
        layer = routed(quant_config(hadamard_block=16), rank, ranks, shapes, kind=kind, **options)
        for name, own in tensors.items():
            e, weight = name.split(".")
            shard, bias = f"gpt_oss_{weight.removesuffix('_weight')}", weight.replace("weight", "bias")
            param, numbers = layer.get_parameter(weight), send(f"m.experts.{name}", [own], SENT)
            assert param.weight_loader(param, numbers, weight, shard, int(e), return_success=True)
            param = layer.get_parameter(bias)
            param.weight_loader(param, biases[name], bias, shard, int(e), return_success=True)
        parts.append(apply(finish(layer), x, routing, ids))
    wanted = torch.zeros_like(x)
    for row, (shares, experts) in enumerate(zip(routing, ids, strict=True)):
        for share, e in zip(shares, experts.tolist(), strict=True):
            outer = weights[f"{e}.w13_weight"] @ x[row] + biases[f"{e}.w13_weight"]
            gate, up = outer[::2].clamp(max=7), outer[1::2].clamp(-7, 7)
            inner = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
            wanted[row] += share * (weights[f"{e}.w2_weight"] @ inner + biases[f"{e}.w2_weight"])
    assert_close(sum(parts), wanted)


@pytest.mark.parametrize("ranks", [1, 3])
def test_experts_without_a_gate(ranks):
    """Nemotron-H: ups whose outputs are squared where they are positive; the sum over ranks is the whole."""
    shapes, names = {"up_proj": (96, 64), "down_proj": (64, 96)}, ("up_proj", "down_proj", None)
    experts, parts, (x, routing, ids) = random_experts(shapes=shapes), [], inputs()
    for rank in range(ranks):
        config = quant_config(hadamard_block=16)
        layer = routed(config, rank, ranks, shapes, names, activation=MoEActivation.RELU2_NO_MUL)
        parts.append(apply(finish(arrive(layer, experts)), x, routing, ids))
    weights, wanted = dense_experts(experts, block=16), torch.zeros_like(x)
    for row, (shares, chosen) in enumerate(zip(routing, ids, strict=True)):
        for share, e in zip(shares, chosen.tolist(), strict=True):
            inner = (weights[f"{e}.up_proj"] @ x[row]).clamp(min=0) ** 2
            wanted[row] += share * (weights[f"{e}.down_proj"] @ inner)
    assert_close(sum(parts), wanted)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM has kernels of its own for them")
def test_only_quantized_experts_may_lack_a_gate_on_a_cpu(monkeypatch):
    of_no_matter = dict.fromkeys(("device", "routing_method", "in_dtype"))
    sizes = dict.fromkeys(("num_experts", "experts_per_token", "num_local_experts", "num_logical_experts"), EXPERTS)
    sizes |= {"hidden_dim": HIDDEN, "intermediate_size": INNER, "activation": MoEActivation.RELU2_NO_MUL}
    alone = FusedMoEParallelConfig.make_no_parallel()
    make = partial(FusedMoEConfig, moe_parallel_config=alone, **sizes, **of_no_matter)
    ours = quant_config(modules_to_not_convert=("m.experts",))
    with monkeypatch.context() as patch:
        patch.setattr(FusedMoEConfig, "__post_init__", FusedMoEConfig.__post_init__)  # restored afterwards
        served = SimpleNamespace(quant_config=None)
        patch.setattr(plugin, "get_current_vllm_config_or_none", lambda: served)
        plugin.postpone_refusal(FusedMoEConfig)
        with pytest.raises(NotImplementedError):
            make()
        served.quant_config = ours
        described = make()
    layer = routed(ours, names=("up_proj", "down_proj", None), activation=MoEActivation.RELU2_NO_MUL)
    layer.moe_config = described
    with pytest.raises(ValueError, match=r"^m.experts has experts without a gate, which vLLM does not run on"):
        ours.get_quant_method(layer, "m.experts")


def test_a_rotation_that_cannot_be_split_is_refused_before_loading():
    with pytest.raises(ValueError, match="m.experts.*rotated as a whole, which cannot be split"):
        routed(quant_config(), 0, 2, {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)})


def test_reloaded_experts_take_the_place_of_the_old_ones():
    layer = routed(quant_config("hyb", 2))
    record_metadata_for_reloading(layer)
    finish(arrive(layer, random_experts("hyb", 2)))
    before = {name: param.data_ptr() for name, param in layer.named_parameters()}
    initialize_layerwise_reload(layer)
    experts = random_experts("hyb", 2, seed=100)
    arrive(layer, experts)
    finalize_layerwise_reload(layer, None)
    assert {name: param.data_ptr() for name, param in layer.named_parameters()} == before
    assert_close(apply(layer, *inputs()), expected(dense_experts(experts, "hyb", 2), *inputs()))


def test_a_missing_expert_is_named():
    experts = random_experts()
    del experts["1.up_proj"]
    with pytest.raises(ValueError, match="tensor packed of m.experts.1.up_proj is not in the checkpoint"):
        finish(arrive(routed(quant_config()), experts))


def test_a_missing_tensor_is_named():
    experts = random_experts()
    del experts["2.down_proj"]["packed"]
    with pytest.raises(ValueError, match="tensor packed of m.experts.2.down_proj is not in the checkpoint"):
        finish(arrive(routed(quant_config()), experts))


def test_an_expert_that_comes_twice_is_named():
    layer = arrive(routed(quant_config()), random_experts())
    with pytest.raises(ValueError, match="m.experts.1.gate_proj is in the checkpoint twice"):
        arrive(layer, {"1.gate_proj": random_experts()["1.gate_proj"]})


def test_a_tensor_of_another_shape_is_named():
    experts = random_experts()
    experts["1.gate_proj"]["packed"] = experts["1.gate_proj"]["packed"][1:]
    with pytest.raises(ValueError, match=r"m.experts.1.gate_proj: tensor packed is torch.int16 \[2, 128\], expected"):
        finish(arrive(routed(quant_config()), experts))


def test_experts_of_other_sizes_are_refused():
    experts = random_experts(shapes={**SHAPES, "gate_proj": (INNER + 16, HIDDEN)})
    with pytest.raises(ValueError, match=r"brings a weight of \[64, 64\] in place of \[48, 64\]"):
        arrive(routed(quant_config()), experts)


def test_formats_have_to_be_those_of_all_experts():
    config = quant_config(layers={"m.experts.1.up_proj": ("1mad", 4)})
    with pytest.raises(ValueError, match="m.experts has experts whose up_proj have 1mad at 2 bits, 1mad at 4 bits: "):
        routed(config)
    config = quant_config(modules_to_not_convert=("m.experts.2",))
    with pytest.raises(ValueError, match="gate_proj have 1mad at 2 bits, an ordinary weight: "):
        routed(config)
    assert routed(quant_config(modules_to_not_convert=("m.experts",))).quant_method is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe_parallel_config": SimpleNamespace(use_ep=True, dp_size=2)}, "expert parallelism.*--enable-expert-par"),
        ({"num_logical_experts": 2}, "copies of experts: serve without --enable-eplb"),
        ({"is_lora_enabled": True}, "LoRA on them: name what else has adapters, as in --lora-target-modules"),
        ({"has_bias": True}, "biases"),
        ({"hidden_dim_unpadded": 60}, "sizes padded"),
        ({"activation": MoEActivation.SWIGLUOAI}, "activation swigluoai, which"),
        ({"swiglu_limit": 7.0}, "activation silu and a limit, which"),
    ],
)
def test_what_is_not_served_ends_in_a_sentence_before_loading(changes, sentence):
    with pytest.raises(ValueError, match=f"^m.experts.*{sentence}") as error:
        routed(quant_config(), **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eager", [True, False])
def test_experts_that_run_one_by_one_are_not_compiled(monkeypatch, eager):
    engine = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager), device_config=SimpleNamespace(device_type="cpu")
    )
    monkeypatch.setattr(moe_method, "get_current_vllm_config_or_none", lambda: engine)
    if eager:
        routed(quant_config())
    else:
        with pytest.raises(ValueError, match="on the reference backend one by one: serve with --enforce-eager"):
            routed(quant_config())


SERVED = [
    ("Qwen3Moe", "1mad", 2, False),
    *(
        pytest.param(*one, marks=pytest.mark.exhaustive)
        for one in [
            ("Qwen3Moe", "e8p", 3, True),
            ("Mixtral", "hyb", 2, True),
            ("Olmoe", "grid", 3, True),
            ("Qwen2Moe", "1mad", 4, True),
        ]
    ),
]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(("architecture", "code", "bits", "eager"), SERVED)
def test_served_log_probabilities_are_those_of_the_dequantized_model(engine, tmp_path, architecture, code, bits, eager):
    folder = moe_files.write(tmp_path / "out", architecture, code, bits)
    assert served_difference(engine, folder, eager) < SERVED_LOG_PROBABILITY


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_served_exl3_experts(engine, tmp_path):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 2, "head_dim": 64}
    source = moe_files.save("Qwen3Moe", tmp_path / "source", **sizes)
    exl3_files.write(source, tmp_path / "out", "mcg")
    assert served_difference(engine, tmp_path / "out") < SERVED_LOG_PROBABILITY


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(("architecture", "down"), [("Mixtral", "w2"), ("Qwen2Moe", "experts.*down_proj")])
def test_served_log_probabilities_of_what_the_quantizer_writes(engine, make_settings, tmp_path, architecture, down):
    from quip_vllm.quantizer.run import quantize

    source = moe_files.save(architecture, tmp_path / "source")
    changes = {"overrides": ((down, 4),), "ignore": ("layers.0.*[.]experts[.]",), "tune": "refit"}
    quantize(make_settings(source, code="1mad", **changes), tmp_path / "out")
    assert served_difference(engine, tmp_path / "out") < SERVED_LOG_PROBABILITY
