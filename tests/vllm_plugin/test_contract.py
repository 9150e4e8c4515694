# SPDX-License-Identifier: Apache-2.0
"""What the plugin uses of vLLM is there, and vLLM's calls fit it: in the installed one and in vllm_contract.json.

The file was read from a wheel of vLLM's CUDA build, which scripts/vllm_contract.py does.
"""

import ast
import functools
import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch
import vllm
import vllm_contract as contract

from quip_vllm.formats.spec import methods
from quip_vllm.vllm_plugin import config, embedding_method, linear_method, parameters

PLUGIN = {n: v for m in (config, embedding_method, linear_method, parameters) for n, v in vars(m).items()}
IMPLEMENTED_BY = {
    "quant_method": (PLUGIN["QuipLinearMethod"], PLUGIN["QuipEmbeddingMethod"]),
    "quant_config": (PLUGIN["QtipConfig"],),
    "quant_cls": (PLUGIN["QtipConfig"],),
    "param": (PLUGIN["QuipParameter"],),
}
OF_VLLM = {"layer", "self.layer", "shard", "group", "hf_to_vllm_mapper"}
"""Names in the plugin of objects that vLLM made."""


@functools.cache
def installed():
    return contract.facts(contract.Sources(Path(vllm.__file__).parents[1]))


@pytest.fixture(params=["released", "installed"])
def facts(request):
    return installed() if request.param == "installed" else json.loads(contract.CONTRACT.read_text())


def parse(description):
    """The signature that `describe` wrote."""
    (function,) = ast.parse(f"def f{description[description.index('(') :]}: pass").body
    return contract.signature(function.args)


def accepts(function, call, *before):
    """Fails unless a signature or a function takes ``before`` and the arguments of an ast.Call."""
    signature = function if isinstance(function, inspect.Signature) else inspect.signature(function)
    try:
        signature.bind(*before, *call.args, **{keyword.arg: None for keyword in call.keywords})
    except TypeError as error:
        pytest.fail(f"{ast.unparse(call)} does not fit {signature}: {error}")


def test_what_the_plugin_imports_is_there(facts):
    assert [where for where, found in facts["imports"].items() if found is None] == []
    assert {*contract.plugin_imports().values()} <= set(facts["imports"])


def test_what_the_plugin_reads_is_there(facts):
    assert [name for name, found in facts["members"].items() if found is None] == []


def test_every_attribute_that_the_plugin_reads_is_listed():
    nodes = [n for tree in contract.plugin_trees() for n in ast.walk(tree)]
    attributes = [n for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) in OF_VLLM]
    own = {"su", "sv"} | {n.attr for n in attributes if isinstance(n.ctx, ast.Store)}
    read = {n.attr for n in attributes} - own - set(dir(torch.nn.Module))
    getattrs = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"]
    read |= {n.args[1].value for n in getattrs if isinstance(n.args[1], ast.Constant)}
    assert read <= {name for names in contract.MEMBERS.values() for name in names}


def test_the_plugins_calls_fit_vllm(facts):
    checked = set()
    members = {name.rpartition(".")[2]: text for name, text in facts["members"].items() if text != "attribute"}
    for tree in contract.plugin_trees():
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            where, method = contract.plugin_imports().get(name), name.rpartition(".")[2]
            if where and facts["imports"][where] != "class":
                accepts(parse(facts["imports"][where]), call)
                checked.add(name)
            elif method in members:
                accepts(parse(members[method]), call, None)
                checked.add(method)
    for name, node in contract.plugin_classes().items():
        for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
            base, method = contract.vllm_base(name), ast.unparse(call.func).removeprefix("super().")
            description = facts["methods"].get(f"{base}.{method}")  # None: the plugin's own base class has it
            if base and description:
                accepts(parse(description), call, *[None] * ("@staticmethod" not in description))
                checked.add(f"{base.rpartition(':')[2]}.{method}")
    functions = {where.rpartition(":")[2] for where, text in facts["imports"].items() if text != "class"}
    assert checked | {"register_weight_loader_v2_supported_method"} == functions | {  # it is a decorator
        "map_name",
        "BasevLLMParameter.__init__",
        "QuantizationConfig.__init__",
        "QuantizationConfig.get_checkpoint_weight_mapper",
    }


def test_the_plugin_takes_what_vllms_base_classes_take(facts):
    for name in contract.plugin_classes():
        base = contract.vllm_base(name)
        for method in contract.functions(contract.plugin_classes()[name]) if base else ():
            description = facts["methods"].get(f"{base}.{method}")
            if description is None or method == "__init__" or "*args" in description or "*weight_args" in description:
                continue  # with those, only the calls tell
            signature = parse(description)
            own = inspect.signature(bound(PLUGIN[name], method))
            given = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
            plain = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
            own.bind(*plain)
            own.bind(**dict.fromkeys(plain))
            own.bind(*[p.name for p in given if p.default is p.empty and p.name in plain])
            if any(p.kind is p.VAR_KEYWORD for p in given):
                assert any(p.kind is p.VAR_KEYWORD for p in own.parameters.values())


def bound(cls, name, on_class=False):
    """A method as its caller sees it: without self."""
    kind = type(inspect.getattr_static(cls, name))
    function = getattr(cls, name)
    return function if on_class or kind in (staticmethod, classmethod) else functools.partial(function, None)


def test_vllms_calls_fit_the_plugin(facts):
    called = set()
    for text in facts["calls"]:
        call = ast.parse(text, mode="eval").body
        receiver, method = call.func.value.id, call.func.attr
        called.add(method)
        if method == "weight_loader":
            accepts(parameters.load_parameter, call)
            if len(call.args) == 2:  # a layer without shards
                accepts(embedding_method._Loader.__call__, call, None)
            continue
        takers = [cls for cls in IMPLEMENTED_BY[receiver] if hasattr(cls, method)]
        assert takers
        for cls in takers:
            accepts(bound(cls, method, receiver == "quant_cls"), call)
    needed = {"create_weights", "apply", "embedding", "tie_weights", "process_weights_after_loading", "weight_loader"}
    assert needed | {"get_quant_method", "from_config", "get_checkpoint_weight_mapper"} <= called


def test_every_abstract_method_is_implemented(facts):
    for name in contract.plugin_classes():
        base = contract.vllm_base(name)
        for method in facts["abstract"][base] if base else ():
            assert any(method in vars(c) for c in PLUGIN[name].__mro__ if c.__module__.startswith("quip_vllm")), name


def test_names(facts):
    literals = facts["literals"]
    assert literals["plugin group"] == ["vllm.general_plugins"]
    assert "dummy" in literals["load formats"]
    assert len(literals["quantization methods"]) > 10
    assert not set(methods()) & set(literals["quantization methods"])


def test_what_is_read_from_sources_is_what_python_sees():
    def plain(function):
        parameters = inspect.signature(getattr(function, "__func__", function)).parameters.values()
        defaults = [p.empty if p.default is p.empty else None for p in parameters]
        both = zip(parameters, defaults, strict=True)
        return str(inspect.Signature([p.replace(annotation=p.empty, default=default) for p, default in both]))

    def find(where):
        module, _, name = where.partition(":")
        return getattr(importlib.import_module(module), name)

    for where, description in installed()["imports"].items():
        found = find(where)
        assert inspect.isclass(found) if description == "class" else plain(found) == description
    for path, description in installed()["methods"].items():
        where, _, name = path.rpartition(".")
        assert plain(inspect.getattr_static(find(where), name)) == description[description.index("(") :]
