# SPDX-License-Identifier: Apache-2.0
"""Reading a folder: tensors by name; damaged and hostile files are refused."""

import fnmatch
import json
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from quip_vllm.checkpoint import store
from quip_vllm.checkpoint.store import CheckpointReader, read_json, write_json

TENSORS = {"b": torch.arange(6, dtype=torch.int16).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


def test_tensors_are_read_by_name(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert sorted(reader.names()) == ["a", "b"] and "a" in reader and "z" not in reader
    assert reader.shapes == {"a": (4,), "b": (2, 3)} and reader.bytes_of == {"a": 8, "b": 12}
    assert set(reader.file_of.values()) == {tmp_path / "model.safetensors"}
    for name, tensor in reader.read(["b", "a"]).items():
        assert reader.dtypes[name] == tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])
    with pytest.raises(ValueError, match="has no tensor z: "):
        reader.read(["z"])


def test_one_file_beside_other_copies_of_the_weights(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"other.a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert CheckpointReader(tmp_path).names() == ["a"]


def write_header(file, header):
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "names '../secret.safetensors': a shard must be a plain file name"),
        ({"a": "/etc/secret"}, "names '/etc/secret': a shard must be a plain file name"),
        ({"a": "sub/x.safetensors"}, "names 'sub/x.safetensors': a shard must be a plain file name"),
        ({"a": ".."}, "cannot be read"),
        ({"a": 7}, "cannot be read"),
        ({"a": "gone.safetensors"}, r"gone.safetensors cannot be read .* missing, truncated or damaged"),
        (["a"], "has no weight_map object"),
        (None, "has no weight_map object"),
        ({}, r"has no \*.safetensors file"),
    ],
)
def test_hostile_index(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(ValueError, match=message):
        CheckpointReader(folder)


def test_damaged_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no \*.safetensors file.*never pickles"):
        CheckpointReader(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="missing, truncated or damaged; fetch or quantize it again"):
        CheckpointReader(tmp_path)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        CheckpointReader(tmp_path)
    write_header(file, {"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}})
    with pytest.raises(ValueError, match="holds a as F8_E8M0"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "holds a list"), (b"\xff", "cannot be read"), (None, "")]
)
def test_read_json_refuses(tmp_path, content, message):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="x.json " + message):
        read_json(file)


def test_local_folder(tmp_path):
    (tmp_path / "config.json").touch()
    assert store.local_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "file"), str(tmp_path / "gone"), "./gone", "gone"):
        with pytest.raises(ValueError, match="is not a folder: give a folder with config.json"):
            store.local_folder(name)
    with pytest.raises(ValueError, match="no body/model is neither a folder nor a model of the hub .*: check the name"):
        store.local_folder("no body/model")


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
        store.local_folder("someone/model")
    assert "\n" not in str(caught.value)


def test_offline_the_cache_is_read_and_that_is_said(hub, tmp_path, caplog):
    from huggingface_hub.errors import OfflineModeIsEnabled

    asked = hub(info=OfflineModeIsEnabled("offline mode is enabled"))
    assert store.local_folder("someone/model") == tmp_path
    assert asked[0]["local_files_only"] is True
    assert "offline mode is enabled): someone/model is read from its cache" in caplog.text


def test_a_name_that_is_nowhere_is_refused_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing-of-this-name cannot be fetched: the hub is out of reach"):
        store.local_folder("nobody/nothing-of-this-name")


def test_the_hub_gives_no_pickles_and_no_second_copy(hub, tmp_path):
    asked = hub()
    assert store.local_folder("someone/model") == tmp_path
    patterns, ignored = asked[0]["allow_patterns"], asked[0]["ignore_patterns"]
    assert asked[0]["local_files_only"] is False
    for second in ("consolidated.safetensors", "original/consolidated.00.safetensors"):
        assert any(fnmatch.fnmatch(second, p) for p in ignored)
    assert not any(fnmatch.fnmatch("model-00001-of-00002.safetensors", p) for p in ignored)
    assert {"*.safetensors", "*.json", "*.tiktoken"} <= set(patterns)
    assert not any(
        fnmatch.fnmatch(f"model.{kind}", p) for kind in ("bin", "pt", "pth", "ckpt", "pkl") for p in patterns
    )
    store.local_folder("someone/model", code=True)
    assert asked[1]["allow_patterns"][-1] == "*.py"


def test_what_the_hubs_cache_has_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    made = tmp_path / "models--someone--model"
    for commit, names in (
        ("of_main", ["model-1.safetensors", "model-2.safetensors"]),
        ("of_branch", [store.SINGLE_NAME]),
    ):
        (made / "snapshots" / commit).mkdir(parents=True)
        for name in names:
            save_file({name: torch.zeros(1)}, made / "snapshots" / commit / name)
    (made / "refs").mkdir()
    for branch in ("main", "branch"):
        (made / "refs" / branch).write_text(f"of_{branch}")
    main = made / "snapshots" / "of_main"
    assert store.at_hand("someone/model") is None, "nothing says which shards there are"
    weight_map = {f"model-{i}.safetensors": f"model-{i}.safetensors" for i in (1, 2)}
    write_json(main / store.INDEX_NAME, {"weight_map": weight_map})
    assert store.at_hand("someone/model") == main and len(CheckpointReader(main).names()) == 2
    assert store.at_hand("someone/model", "branch") == main.with_name("of_branch")
    (main / "model-2.safetensors").unlink()  # not fetched yet
    assert store.at_hand("someone/model") is None and store.at_hand(str(main)) == main
    for elsewhere in ("someone/other", "s3://bucket/model", "one/two/three"):
        assert store.at_hand(elsewhere) is None
    write_json(main / store.INDEX_NAME, {"weight_map": {"a": "../model-1.safetensors"}})
    with pytest.raises(ValueError, match="a shard must be a plain file name"):
        store.at_hand("someone/model")
