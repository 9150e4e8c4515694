# SPDX-License-Identifier: Apache-2.0
"""Writes what the plugin takes for granted of vLLM, read from a wheel, into tests/vllm_plugin/vllm_contract.json.

    .venv/bin/pip download --no-deps vllm==0.33.0 -d build/vllm_contract
    .venv/bin/python scripts/vllm_contract.py build/vllm_contract/vllm-*.whl

Nothing is installed or imported: the sources are read from the wheel, which is why a CUDA build can be read on any
machine. tests/vllm_plugin/test_contract.py holds the plugin against the file, and against the vLLM that is installed.
"""

import argparse
import ast
import hashlib
import inspect
import json
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "quip_vllm" / "vllm_plugin"
CONTRACT = ROOT / "tests" / "vllm_plugin" / "vllm_contract.json"
LAYERS = "vllm.model_executor.layers"

MEMBERS = {
    f"{LAYERS}.linear:QKVParallelLinear": ("num_kv_head_replicas",),
    f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding": (
        "tp_size",
        "org_vocab_size",
        "shard_indices",
        "quant_method",
    ),
    f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": (
        "org_vocab_start_index",
        "org_vocab_end_index",
    ),
    "vllm.model_executor.parameter:BasevLLMParameter": ("tp_rank",),
    "vllm.model_executor.models.utils:WeightsMapper": ("map_name",),
    f"{LAYERS}.quantization.base_config:QuantizationConfig": ("packed_modules_mapping",),
    "vllm.distributed.parallel_state:GroupCoordinator": ("is_first_rank", "is_last_rank"),
    "vllm.config:VllmConfig": ("load_config",),
    "vllm.config:LoadConfig": ("load_format",),
}
"""What the plugin reads from vLLM's objects, by class."""

LITERALS = {
    "plugin group": "vllm.plugins:DEFAULT_PLUGINS_GROUP",
    "quantization methods": f"{LAYERS}.quantization:QuantizationMethods",
    "load formats": "vllm.model_executor.model_loader:LoadFormats",
}
"""Constants whose strings the plugin repeats, or must not repeat."""

CALLERS = (
    "config/model.py",
    "config/vllm.py",
    "model_executor/layers/linear.py",
    "model_executor/layers/logits_processor.py",
    "model_executor/layers/quantization/base_config.py",
    "model_executor/layers/vocab_parallel_embedding.py",
    "model_executor/model_loader/dummy_loader.py",
    "model_executor/model_loader/utils.py",
    "model_executor/model_loader/weight_utils.py",
    "model_executor/models/interfaces.py",
    "model_executor/models/llama.py",
    "model_executor/models/utils.py",
)
"""Files of vLLM that call what the plugin implements."""

RECEIVERS = ("quant_method", "quant_config", "quant_cls", "param")


@cache
def plugin_trees() -> tuple[ast.Module, ...]:
    """The plugin's modules."""
    return tuple(ast.parse(path.read_text()) for path in sorted(PLUGIN.glob("*.py")))


def plugin_imports() -> dict[str, str]:
    """Name in the plugin -> "module:name" of vLLM, wherever the import stands."""
    nodes = [n for tree in plugin_trees() for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    vllm = [n for n in nodes if n.module and n.module.split(".")[0] == "vllm"]
    return {alias.asname or alias.name: f"{node.module}:{alias.name}" for node in vllm for alias in node.names}


def plugin_classes() -> dict[str, ast.ClassDef]:
    """The plugin's classes by name."""
    return {n.name: n for tree in plugin_trees() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}


def vllm_base(name: str) -> str | None:
    """ "module:name" of the vLLM class that a class of the plugin derives from, maybe through another one."""
    for base in map(ast.unparse, plugin_classes()[name].bases):
        found = plugin_imports().get(base) or (vllm_base(base) if base in plugin_classes() else None)
        if found:
            return found
    return None


def functions(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """The functions of a class by name."""
    return {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}


def overridden() -> dict[str, set[str]]:
    """Class of vLLM -> names of the functions that the plugin's classes below it define."""
    found: dict[str, set[str]] = {}
    for name, node in plugin_classes().items():
        if base := vllm_base(name):
            found.setdefault(base, set()).update(functions(node))
    return found


class Sources:
    """The modules of a vLLM, in a wheel or in a folder.

    Args:
        root: what holds the folder ``vllm``.
    """

    def __init__(self, root: Path | zipfile.Path) -> None:
        self.root = root
        self.trees: dict[str, ast.Module] = {}

    def tree(self, file: str) -> ast.Module | None:
        """A file's contents, or None where there is none."""
        path = self.root / "vllm" / file
        if file not in self.trees and path.exists():
            self.trees[file] = ast.parse(path.read_text(encoding="utf-8"))
        return self.trees.get(file)

    def module(self, module: str) -> ast.Module | None:
        """A module's contents."""
        path = "/".join(module.split(".")[1:])
        return self.tree(f"{path}.py") or self.tree(f"{path}/__init__.py")

    def find(self, where: str) -> tuple[str, ast.stmt] | None:
        """The statement that defines "module:name", and its module; imports are followed, with an asterisk, too."""
        module, name = where.split(":")
        tree = self.module(module)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in (getattr(t, "id", None) for t in targets):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name) or alias.name == "*":
                        found = self.find(f"{self._absolute(module, node)}:{name if alias.name == '*' else alias.name}")
                        if found:
                            return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = self.tree("/".join([*parts[1:], "__init__.py"])) is not None
        parent = parts[: len(parts) - node.level + is_package]
        return ".".join([*parent, *([node.module] if node.module else [])])

    def ancestry(self, where: str) -> Iterator[ast.ClassDef]:
        """A class, then its bases in vLLM."""
        found = self.find(where)
        if found and isinstance(found[1], ast.ClassDef):
            yield found[1]
            for base in found[1].bases:
                yield from self.ancestry(f"{found[0]}:{ast.unparse(base)}")


def signature(arguments: ast.arguments) -> inspect.Signature:
    """The parameters without annotations: (self, layer, *weight_args, bias=None); None is every default."""
    kinds = inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)

    def parameter(arg: ast.arg, kind, default: bool = False) -> inspect.Parameter:
        return kinds(arg.arg, kind, default=None if default else kinds.empty)

    found = [
        parameter(
            arg,
            kinds.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            i >= first_default,
        )
        for i, arg in enumerate(plain)
    ]
    found += [parameter(arg, kinds.VAR_POSITIONAL) for arg in (arguments.vararg,) if arg]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [parameter(arg, kinds.KEYWORD_ONLY, default is not None) for arg, default in pairs]
    found += [parameter(arg, kinds.VAR_KEYWORD) for arg in (arguments.kwarg,) if arg]
    return inspect.Signature(found)


def describe(function: ast.FunctionDef) -> str:
    """Signature of a function, after its decorators: "@staticmethod @abstractmethod ()"."""
    return " ".join([*(f"@{ast.unparse(d)}" for d in function.decorator_list), str(signature(function.args))])


def member(node: ast.ClassDef, name: str) -> str | None:
    """What a class has under a name: a function's description, "attribute", or None."""
    if name in functions(node):
        return describe(functions(node)[name])
    for n in ast.walk(node):
        targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
        names = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if any(ast.unparse(t) in (name, f"self.{name}") for t in names):
            return "attribute"
    return None


def calls(sources: Sources) -> list[str]:
    """Calls in vLLM of what the plugin implements: "quant_method.embedding(_, _)"."""
    names, found = {"weight_loader"}.union(*overridden().values()), set()
    for node in (n for file in CALLERS if (tree := sources.tree(file)) for n in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            *before, name = ast.unparse(node.func).split(".")
            receiver = before[-1] if before else "param" if name == "weight_loader" else ""
            if receiver in RECEIVERS and name in names:
                given = ["_" for _ in node.args] + [f"{keyword.arg}=_" for keyword in node.keywords]
                found.add(f"{receiver}.{name}({', '.join(given)})")
    return sorted(found)


def facts(sources: Sources) -> dict[str, dict | list[str]]:
    """What this vLLM has of all that the plugin uses."""
    imports: dict[str, str | None] = {}
    for where in sorted({*plugin_imports().values(), *MEMBERS}):
        node = (sources.find(where) or ("", None))[1]
        imports[where] = describe(node) if isinstance(node, ast.FunctionDef) else "class" if node else None
    methods, abstract = {}, {}
    for where, names in sorted(overridden().items()):
        inherited: dict[str, str] = {}
        for ancestor in reversed(list(sources.ancestry(where))):
            inherited |= {name: describe(function) for name, function in functions(ancestor).items()}
        methods |= {f"{where}.{name}": text for name, text in inherited.items() if name in names}
        abstract[where] = sorted(name for name, text in inherited.items() if "@abstractmethod" in text)
    members = {}
    for where, names in sorted(MEMBERS.items()):
        ancestry = list(sources.ancestry(where))
        for name in names:
            members[f"{where}.{name}"] = next((text for node in ancestry if (text := member(node, name))), None)
    literals = {}
    for label, where in LITERALS.items():
        node = (sources.find(where) or ("", None))[1]
        constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)] if node else []
        literals[label] = sorted(value for value in constants if isinstance(value, str))
    return {
        "imports": imports,
        "methods": methods,
        "abstract": abstract,
        "members": members,
        "literals": literals,
        "calls": calls(sources),
    }


def main() -> int:
    """Reads the wheel and writes the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a wheel of vllm")
    wheel = parser.parse_args().wheel
    if not zipfile.is_zipfile(wheel):
        print(f"{wheel} is no wheel: give the file that `pip download vllm` leaves", file=sys.stderr)
        return 2
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    found = {"wheel": wheel.name, "sha256": digest, **facts(Sources(zipfile.Path(wheel)))}
    CONTRACT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {CONTRACT.relative_to(ROOT)} from {wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
