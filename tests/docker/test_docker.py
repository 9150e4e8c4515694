# SPDX-License-Identifier: Apache-2.0
"""The images do what continuous integration does, and the compose files hold together. No docker engine is needed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
COMPOSE, COMPOSE_CUDA = (
    yaml.safe_load((ROOT / "docker" / name).read_text()) for name in ("compose.yaml", "compose.cuda.yaml")
)


def _instructions(path: Path) -> list[tuple[str, str]]:
    """(keyword, rest) of each instruction, with continued lines joined and comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [(keyword.upper(), rest) for keyword, rest in re.findall(r"^(\w+)\s+(.*)$", text, flags=re.M)]


def _make_targets_in(command: str) -> set[str]:
    """Targets of the ``make`` calls in a shell command; ``NAME=value`` words are variables."""
    calls = re.findall(r"(?:^|&&|;|\s)make((?:\s+[\w./:=-]+)+)", command)
    return {word for call in calls for word in call.split() if "=" not in word}


def _makefile_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    heads = re.findall(r"^([\w./ -]+):(?!=)", text, flags=re.M)
    return {target for head in heads for target in head.split()}


def test_both_images_are_here() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_steps_are_make_targets(path: Path) -> None:
    used = set().union(*(_make_targets_in(rest) for keyword, rest in _instructions(path) if keyword == "RUN"))
    assert used == {"venv", "check", "test"}
    assert used <= _makefile_targets()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_pinned_rootless_and_fetches_no_url(path: Path) -> None:
    instructions = _instructions(path)
    stages: set[str] = set()
    for base, stage in (rest.split(" AS ") for keyword, rest in instructions if keyword == "FROM"):
        assert base in stages or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", base), base
        stages.add(stage)
    assert [rest for keyword, rest in instructions if keyword == "USER"] == ["10001:10001"]
    assert all(keyword != "ADD" for keyword, _ in instructions)
    for keyword, rest in instructions:
        assert not re.search(r"(?i)password|secret|token|api_key|\bcurl\b|\bwget\b|https?://", rest), (keyword, rest)


def test_server_is_healthy_inside_its_network_with_the_model_read_only() -> None:
    server = COMPOSE["services"]["server"]
    assert [volume.rsplit(":", 2)[1:] for volume in server["volumes"]] == [["/model", "ro"]]
    assert "127.0.0.1:8000/health" in server["healthcheck"]["test"][-1]
    assert COMPOSE["networks"] == {"inside": {"internal": True}}
    for service in COMPOSE["services"].values():
        assert service["networks"] == ["inside"]
        assert "ports" not in service
    for path in DOCKERFILES:
        command = json.loads(dict(_instructions(path))["CMD"])
        assert command == ["/model", "--host", "0.0.0.0", "--port", "8000"]


def test_load_test_waits_for_the_server_and_is_a_make_target() -> None:
    loadtest = COMPOSE["services"]["loadtest"]
    assert loadtest["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert "SERVER=http://server:8000" in loadtest["command"]
    assert _make_targets_in(" ".join(loadtest["entrypoint"])) == {"loadtest"} <= _makefile_targets()


@pytest.mark.parametrize("compose", [COMPOSE, {**COMPOSE, **COMPOSE_CUDA}], ids=["cpu", "cuda"])
def test_services_share_one_image_of_an_existing_dockerfile(compose: dict[str, Any]) -> None:
    images: list[dict[str, Any]] = [service["build"] for service in compose["services"].values()]
    assert len(compose["services"]) == 2
    assert images[0] == images[1]
    assert (ROOT / images[0]["dockerfile"]).is_file()
