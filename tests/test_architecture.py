# SPDX-License-Identifier: Apache-2.0
"""The dependency rule of docs/design/architecture.md: imports point down, siblings do not see each other."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "quip_vllm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ALLOWED = {
    "cli": {"quantizer", "evaluation", "vllm_plugin", "checkpoint", "formats", "doctor"},
    "doctor": {"ops", "formats"},
    "nn": {"ops", "formats"},
    "vllm_plugin": {"ops", "checkpoint", "transforms", "formats"},
    "hf_plugin": {"nn", "ops", "checkpoint", "formats"},
    "quantizer": {"nn", "ops", "checkpoint", "transforms", "formats"},
    "evaluation": {"nn", "ops", "checkpoint", "formats"},
    "checkpoint": {"formats", "transforms"},
    "ops": {"transforms", "formats", "envs"},
    "transforms": set(),
    "formats": {"transforms"},
    "envs": set(),
}
ONLY_IN = {
    "vllm": {"vllm_plugin"},
    "transformers": {"hf_plugin", "quantizer", "evaluation", "checkpoint"},
    "accelerate": {"quantizer", "evaluation"},
    "datasets": {"quantizer", "evaluation"},
    "triton": {"ops"},
}
TORCH_ONLY = {"formats", "transforms"}


def part_of(path: Path) -> str:
    """First folder below quip_vllm, or the module's own name at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "quip_vllm" else {module}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    if part == "__init__":
        assert not imports(path)
        return
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "quip_vllm":
            target = rest[0]
            if target != "__version__":
                assert target == part or target in ALLOWED[part], f"{part} must not import {name}"
        elif top in ONLY_IN:
            assert part in ONLY_IN[top], f"only {ONLY_IN[top]} may import {top}"
        elif part in TORCH_ONLY:
            assert top == "torch" or top in sys.stdlib_module_names, f"{part} must not import {name}"


def test_environment_is_read_in_one_place():
    readers = [path for path in SOURCES if re.search(r"os\.environ|getenv", path.read_text())]
    assert readers == [PACKAGE / "envs.py"]


def test_torch_headers_only_in_the_checks_of_the_bindings():
    kernels = ROOT / "kernels"
    users = [p for p in kernels.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh") and "torch/" in p.read_text()]
    assert sorted(path.name for path in users) == ["torch_checks.h"]
    users = [p for p in kernels.rglob("*") if p.suffix in (".h", ".cpp", ".cu") and "torch_checks.h" in p.read_text()]
    assert users and all(re.fullmatch(r"bindings(_\w+)?", path.stem) for path in users)


@pytest.mark.parametrize("suffix", ["*.py", "*.h", "*.cpp", "*.cu"])
def test_every_source_file_has_a_licence_header(suffix):
    folders = ("quip_vllm", "kernels", "scripts", "tests", "loadtests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob(suffix)):
        assert "SPDX-License-Identifier: Apache-2.0" in path.read_text().split("\n", 1)[0], path


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_pages_name_files_that_exist(page):
    """docs/benchmarks names files of older commits, and the compiled libraries are not in the repository."""
    named = re.findall(
        r"(?<![\w/.-])((?:scripts|docs|tests|kernels|quip_vllm|docker)/[\w./*-]*[\w*])(?![<\w])", page.read_text()
    )
    wanted = [name for name in named if not name.startswith("quip_vllm/lib/")]
    assert not [name for name in wanted if not any(ROOT.glob(name))]
