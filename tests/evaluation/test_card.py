# SPDX-License-Identifier: Apache-2.0
"""Model cards: what they say, what they refuse, and what goes to the hub."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError

from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.cli import main
from quip_vllm.evaluation.card import MARK, card

FIGURES = {"text": "a.txt", "windows": 3, "perplexity": 12.345, "reference_perplexity": 10.0}
FIGURES |= {"kl_divergence": 0.25, "top1_agreement": 0.75}


@pytest.fixture
def checkpoint(quantized, tmp_path):
    """A copy of a checkpoint that may be written to, without its links."""
    return shutil.copytree(quantized(), tmp_path / "out")


def test_a_card_says_what_was_done_and_measured(checkpoint, tmp_path):
    write_json(tmp_path / "e.json", {"results": [FIGURES], "sequence_length": 2048})
    assert main(["card", str(checkpoint), "--evaluation", str(tmp_path / "e.json")]) == 0
    text = (checkpoint / "README.md").read_text()
    assert "| a.txt | 3 | 2048 | 12.35 | 10.00 | 0.2500 | 75.0 % |" in text and "`quip_sharp` (code `e8p`)" in text
    assert "vllm serve out" in text and "| tune | none |" in text and str(tmp_path) not in text
    assert "base_model" not in text  # it was a folder of this machine
    assert main(["card", str(checkpoint)]) == 0 and "Not measured." in (checkpoint / "README.md").read_text()


def test_a_hub_name_is_the_base_model(checkpoint):
    report = checkpoint / "quantization_report.json"
    report.write_text(report.read_text().replace('"model": "', '"model": "someone/model", "was": "', 1))
    assert "base_model: someone/model\n" in card(checkpoint, name="me/small") and "vllm serve me/small" in card(
        checkpoint, name="me/small"
    )


def test_what_is_refused(checkpoint, tmp_path, capsys):
    (checkpoint / "README.md").write_text("mine")
    assert main(["card", str(checkpoint)]) == 2 and "was not written by quip-vllm card" in capsys.readouterr().err
    assert (checkpoint / "README.md").read_text() == "mine"
    write_json(tmp_path / "e.json", {"results": [{}]})
    assert main(["card", str(checkpoint), "--evaluation", str(tmp_path / "e.json")]) == 2
    assert "is not what quip-vllm evaluate --json writes" in capsys.readouterr().err
    (checkpoint / ".quantize").mkdir()
    assert main(["card", str(checkpoint), "--dry-run"]) == 2 and "unfinished run" in capsys.readouterr().err


def test_what_is_uploaded(checkpoint, monkeypatch, capsys):
    sent = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            sent["made"] = name, exist_ok

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            if "/" not in repo_id:
                raise HFValidationError("no\nname")
            sent.update(name=repo_id, folder=folder_path, files=allow_patterns)
            return "https://address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert main(["card", str(checkpoint), "--push", "me/small", "--dry-run"]) == 0 and not sent
    assert not (checkpoint / "README.md").exists()
    listed = capsys.readouterr().out
    assert "model.safetensors" in listed and "vllm serve me/small" in listed
    assert main(["card", str(checkpoint), "--push", "me/small"]) == 0
    assert "https://address" in capsys.readouterr().out
    assert sent["made"] == ("me/small", True) and sent["name"] == "me/small" and sent["folder"] == checkpoint
    assert {"README.md", "config.json", "model.safetensors"} <= set(sent["files"])
    assert MARK in (checkpoint / "README.md").read_text()
    assert main(["card", str(checkpoint), "--push", "small"]) == 2
    assert "small cannot be written (no name): check the name and your token" in capsys.readouterr().err


def test_a_checkpoint_cannot_write_elsewhere_or_its_own_words(checkpoint, tmp_path, capsys):
    report = read_json(checkpoint / "quantization_report.json")
    write_json(checkpoint / "quantization_report.json", report | {"quip_vllm": "1\n\n# `owned`\n"})
    text = card(checkpoint)
    assert "\n# " in text and "owned" in text and "\n# owned" not in text and "`owned`" not in text
    (checkpoint / "README.md").symlink_to(tmp_path / "elsewhere")
    assert main(["card", str(checkpoint)]) == 2 and "README.md is a link: remove it first" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    (checkpoint / "README.md").unlink()
    (checkpoint / "notes.txt").symlink_to("/etc/hostname")
    assert main(["card", str(checkpoint), "--dry-run"]) == 2 and "outside of the model" in capsys.readouterr().err
    (checkpoint / "notes.txt").unlink()
    write_json(checkpoint / "quantization_report.json", report | {"settings": []})
    assert main(["card", str(checkpoint)]) == 2 and "is damaged: delete it for a card" in capsys.readouterr().err
    for change in ({"perplexity": None}, {"text": 3}, {"windows": []}):
        write_json(tmp_path / "e.json", {"results": [FIGURES | change], "sequence_length": 2048})
        assert main(["card", str(checkpoint), "--evaluation", str(tmp_path / "e.json")]) == 2
