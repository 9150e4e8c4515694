# SPDX-License-Identifier: Apache-2.0
"""A model's folder, here, in the hub's cache or fetched; what the hub does not give is said in a sentence."""

import fnmatch
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from quip_vllm.checkpoint.hub import TOKENIZER, at_hand, copy_files, load_config, local_folder
from quip_vllm.checkpoint.store import INDEX_NAME, SINGLE_NAME, CheckpointReader, read_json, write_json
from quip_vllm.evaluation.loading import load_model


def test_local_folder(tmp_path):
    (tmp_path / "config.json").touch()
    assert local_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "file"), str(tmp_path / "gone"), "./gone", "gone"):
        with pytest.raises(ValueError, match="is not a folder: give a folder with config.json"):
            local_folder(name)
    with pytest.raises(ValueError, match="no body/model is neither a folder nor a model of the hub .*: check the name"):
        local_folder("no body/model")


def answer(kind):
    """An error of the hub's library, made from an answer of the hub with a body of many lines."""
    import huggingface_hub.errors as errors

    response = SimpleNamespace(headers={}, request=None)
    return getattr(errors, kind)("Said first.\n\nSaid last.", response=response)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(info, files): what asking for a model's name, and for its files, raises; files None: it is there."""
    asked = []
    (tmp_path / "config.json").touch()

    def hub(info=None, files=None):
        def raising(error):
            if error is not None:
                raise error
            return str(tmp_path)

        def snapshot_download(name, **options):
            asked.append(options)
            return raising(files)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, timeout: raising(info))
        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    return hub


def out_of_reach():
    from huggingface_hub.errors import LocalEntryNotFoundError

    return {
        "info": RuntimeError("[Errno -2] Name or service not known"),
        "files": LocalEntryNotFoundError("Many\nlines"),
    }


@pytest.mark.parametrize(
    ("failures", "sentence"),
    [
        (
            lambda: {"info": answer("RepositoryNotFoundError")},
            "is neither a folder nor a model of the hub that you may",
        ),
        (
            lambda: {"files": answer("GatedRepoError")},
            "is gated: accept its terms on the hub, log in with `hf auth login`",
        ),
        (lambda: {"files": answer("HfHubHTTPError")}, "cannot be fetched: Said first.; give a folder, or try again"),
        (lambda: {"files": OSError(28, "No space")}, r"cannot be fetched: \[Errno 28\] No space; give a folder"),
        (
            out_of_reach,
            r"the hub is out of reach \(\[Errno -2\] Name or service not known\) and its cache holds no copy;",
        ),
    ],
)
def test_what_the_hub_does_not_give(hub, failures, sentence):
    hub(**failures())
    with pytest.raises(ValueError, match=f"^model someone/model .*{sentence}") as caught:
        local_folder("someone/model")
    assert "\n" not in str(caught.value)


def test_offline_the_cache_is_read_and_that_is_said(hub, tmp_path, caplog):
    from huggingface_hub.errors import OfflineModeIsEnabled

    asked = hub(info=OfflineModeIsEnabled("offline mode is enabled"))
    assert local_folder("someone/model") == tmp_path
    assert asked[0]["local_files_only"] is True
    assert "offline mode is enabled): someone/model is read from its cache" in caplog.text


def test_a_name_that_is_nowhere_is_refused_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing-of-this-name cannot be fetched: the hub is out of reach"):
        local_folder("nobody/nothing-of-this-name")


def test_the_hub_gives_no_pickles_and_no_second_copy(hub, tmp_path):
    asked = hub()
    assert local_folder("someone/model") == tmp_path
    patterns, ignored = asked[0]["allow_patterns"], asked[0]["ignore_patterns"]
    assert asked[0]["local_files_only"] is False
    for second in ("consolidated.safetensors", "original/consolidated.00.safetensors"):
        assert any(fnmatch.fnmatch(second, p) for p in ignored)
    assert not any(fnmatch.fnmatch("model-00001-of-00002.safetensors", p) for p in ignored)
    assert {"*.safetensors", "*.json", "*.tiktoken"} <= set(patterns)
    assert not any(
        fnmatch.fnmatch(f"model.{kind}", p) for kind in ("bin", "pt", "pth", "ckpt", "pkl") for p in patterns
    )
    local_folder("someone/model", code=True)
    assert asked[1]["allow_patterns"][-1] == "*.py"


def test_what_the_hubs_cache_has_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    made = tmp_path / "models--someone--model"
    for commit, names in (
        ("of_main", ["model-1.safetensors", "model-2.safetensors"]),
        ("of_branch", [SINGLE_NAME]),
    ):
        (made / "snapshots" / commit).mkdir(parents=True)
        for name in names:
            save_file({name: torch.zeros(1)}, made / "snapshots" / commit / name)
    (made / "refs").mkdir()
    for branch in ("main", "branch"):
        (made / "refs" / branch).write_text(f"of_{branch}")
    main = made / "snapshots" / "of_main"
    assert at_hand("someone/model") is None, "nothing says which shards there are"
    weight_map = {f"model-{i}.safetensors": f"model-{i}.safetensors" for i in (1, 2)}
    write_json(main / INDEX_NAME, {"weight_map": weight_map})
    assert at_hand("someone/model") == main and len(CheckpointReader(main).names()) == 2
    assert at_hand("someone/model", "branch") == main.with_name("of_branch")
    (main / "model-2.safetensors").unlink()  # not fetched yet
    assert at_hand("someone/model") is None and at_hand(str(main)) == main
    for elsewhere in ("someone/other", "s3://bucket/model", "one/two/three"):
        assert at_hand(elsewhere) is None
    write_json(main / INDEX_NAME, {"weight_map": {"a": "../model-1.safetensors"}})
    with pytest.raises(ValueError, match="a shard must be a plain file name"):
        at_hand("someone/model")


def test_a_link_out_of_a_model_does_not_travel(tmp_path):
    model, secret = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    secret.write_text("mine")
    (model / "notes.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=f"notes.txt is a link to {secret}, outside of the model: put the file itself"):
        copy_files(model, tmp_path / "out", ["*.txt"])
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    (tmp_path / "cache" / "blobs" / "0").write_text("theirs")
    (snapshot / "notes.txt").symlink_to("../../blobs/0")
    (snapshot / "below").mkdir()
    (snapshot / "below" / "vocab.json").write_text("{}")
    copy_files(snapshot, tmp_path / "out", ["*.txt", "*.json"])
    assert (tmp_path / "out" / "notes.txt").read_text() == "theirs" and (tmp_path / "out" / "below").is_dir()
    copy_files(snapshot, tmp_path / "tokenizer", TOKENIZER, below=False)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config.json has num_hidden_layers 1000000000, but the files hold"),
        ({"vocab_size": 10**12}, "of which config.json makes"),
    ],
)
def test_sizes_of_config_json_cost_no_memory(quantized, tmp_path, change, message):
    folder = shutil.copytree(quantized(), tmp_path / "copy")
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))


def test_config_json_names_no_code_to_be_fetched(quantized, tmp_path):
    folder = shutil.copytree(quantized(), tmp_path / "copy")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"_attn_implementation": "someone/kernel"})
    assert load_config(folder)._attn_implementation is None and load_model(str(folder))
