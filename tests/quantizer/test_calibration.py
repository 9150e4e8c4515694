# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens from each source, the same for the same seed."""

import hashlib
import json
import re
import shutil
import sys
import unicodedata
from importlib import resources

import pytest
import torch
from numerics import FLOAT32_LAYERS

from quip_vllm.quantizer.source.calibration import calibration_tokens
from quip_vllm.quantizer.source.documents import bundled_documents
from quip_vllm.quantizer.source.self_text import DRAWN, LIKELIEST, beginnings, prepack, reserve


@pytest.fixture
def tokens(tiny_model, make_settings):
    def tokens(**changes):
        return calibration_tokens(make_settings(tiny_model(), **changes), tiny_model(), 272)

    return tokens


def test_file(tokens, tiny_text, tiny_model):
    from transformers import AutoTokenizer

    found = tokens(sequences=20, sequence_length=30)
    assert found.shape == (20, 30) and found.dtype == torch.int64
    assert (found[:, 0] == 256).all()  # the start token: a model may be another one without it
    text = AutoTokenizer.from_pretrained(tiny_model()).decode(found[3, 1:])
    whole = tiny_text.read_text()
    assert text in whole and whole.index(text) % 29 == 0
    assert len({tuple(row) for row in found.tolist()}) == 20
    assert torch.equal(found, tokens(sequences=20, sequence_length=30))
    assert not torch.equal(found, tokens(sequences=20, sequence_length=30, seed=1))


def test_a_text_that_is_shorter_is_used_for_what_it_has(tokens, caplog):
    assert tokens(sequences=100, sequence_length=61).shape == (100, 61) and not caplog.messages
    found = tokens(sequences=101, sequence_length=61)
    assert torch.equal(found, tokens(sequences=100, sequence_length=61))
    assert "has 100 sequences of 61 tokens, not 101: all are used" in caplog.text


def test_file_too_short(tokens):
    with pytest.raises(ValueError, match="has 6000 tokens, hence 1 sequences of 4000: give a text .* 4096 tokens"):
        tokens(sequences=2, sequence_length=4000)


@pytest.mark.parametrize(("changes", "token"), [({}, 256), ({"calibration": "self"}, 256)])
def test_tokens_of_another_model(make_settings, tiny_model, changes, token):
    settings = make_settings(tiny_model(), **changes)
    with pytest.raises(
        ValueError, match=f"makes token {token}, but the model knows 100: fetch the model's own tokenizer"
    ):
        calibration_tokens(settings, tiny_model(), 100)


def test_file_that_cannot_be_read(tokens, tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name in ("latin", "gone"):
        with pytest.raises(ValueError, match="cannot be read .*: give a UTF-8 text, hub:DATASET, bundle or self"):
            tokens(calibration=str(tmp_path / name))


def test_the_bundle_is_the_one_that_was_measured():
    packed = resources.files("quip_vllm.quantizer.source").joinpath("bundle", "calibration.jsonl.xz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == "7d76b5fa8ff39312f632e479d34048135762092a8c0fd519b038c70c95ff2140"


def test_the_bundle_has_text_of_many_kinds():
    documents = bundled_documents()
    texts = [document for document in documents if isinstance(document, str)]
    dialogues = [document for document in documents if not isinstance(document, str)]
    size = sum(len(text.encode()) for text in texts)
    size += sum(len(message["content"].encode()) for dialogue in dialogues for message in dialogue)
    assert 1_150_000 < size < 1_350_000
    assert len(set(texts)) == len(texts) and min(map(len, texts)) >= 300
    assert len(dialogues) >= 60
    for dialogue in dialogues:
        assert [message["role"] for message in dialogue] == ["user", "assistant"] * (len(dialogue) // 2)
    letters = [c for text in texts for c in set(text) if c.isalpha()]
    scripts = {unicodedata.name(c, "?").split()[0] for c in letters if letters.count(c) >= 2 or ord(c) > 0x370}
    expected = "LATIN CYRILLIC GREEK ARABIC HEBREW DEVANAGARI BENGALI TAMIL THAI HANGUL HIRAGANA KATAKANA CJK GEORGIAN"
    assert set(expected.split()) <= scripts
    # A word of each of twelve languages in the Latin script.
    words = "the und tutti personne oikeu olan człowiek inimes derechos direito menneske drept"
    assert all(any(re.search(rf"\b{word}", text) for text in texts) for word in words.split())
    for code in ("def ", "#include|sqlite3_", "func ", "fn ", "function "):
        assert sum(bool(re.search(code, text)) for text in texts) >= 5


def test_sequences_of_the_bundle_begin_with_a_document(tokens, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    found = tokens(calibration="bundle", sequences=40, sequence_length=100)
    assert found.shape == (40, 100) and found.dtype == torch.int64
    assert (found[:, 0] == tokenizer.bos_token_id).all() and (found[:, 1:] != tokenizer.bos_token_id).all()
    heads = [tokenizer.decode(row[1:]) for row in found]
    starts = tuple(x if isinstance(x, str) else f"User: {x[0]['content']}\n\nAssistant: " for x in bundled_documents())
    for head in heads:
        whole = head.rstrip("\ufffd")  # a sequence may end inside a character
        assert any(start.startswith(whole) or whole.startswith(start) for start in starts)
    assert len(set(heads)) == 40 and any(head.startswith("User: ") for head in heads)
    assert torch.equal(found, tokens(calibration="bundle", sequences=40, sequence_length=100))
    assert not torch.equal(found, tokens(calibration="bundle", sequences=40, sequence_length=100, seed=1))


def test_a_long_sequence_of_the_bundle_holds_several_documents(tokens):
    found = tokens(calibration="bundle", sequences=3, sequence_length=9000)
    starts = (found == 256).sum(1)
    assert (found[:, 0] == 256).all() and (starts >= 2).all()


def test_dialogues_go_through_the_chat_template(tiny_model, make_settings, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model(), folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())

    def found(template):
        file.write_text(json.dumps(config | {"chat_template": template}))
        settings = make_settings(folder, calibration="bundle", sequences=64, sequence_length=24)
        rows = calibration_tokens(settings, folder, 272)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [tokenizer.decode(row) for row in rows]

    from transformers import AutoTokenizer

    start = AutoTokenizer.from_pretrained(folder).bos_token
    chat = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    heads = [text for text in found(chat) if "<user>" in text]
    assert len(heads) >= 5 and all(text.startswith(f"{start}<user>") for text in heads)  # one first token, not two
    assert not any("User: " in text for text in found(chat))
    with pytest.raises(ValueError, match="chat template cannot be applied .*no dialogues.*: mend it, or give a text"):
        found("{{ raise_exception('no dialogues') }}")


def test_several_sources_have_equal_shares(tokens, tiny_text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("x" * 6000)
    found = tokens(calibration=f"{other},bundle,{tiny_text},self", sequences=10, sequence_length=30)
    single = [
        tokens(calibration=str(source), sequences=count, sequence_length=30)
        for source, count in ((other, 3), ("bundle", 3), (tiny_text, 2), ("self", 2))
    ]
    assert torch.equal(found, torch.cat(single))
    assert len({tuple(row) for row in found[:3].tolist()}) == 1  # nothing but x


def test_self_is_deterministic_by_seed(tokens):
    found = tokens(calibration="self", sequences=3, sequence_length=12)
    assert found.shape == (3, 12) and found.dtype == torch.int64
    assert len({tuple(row) for row in found.tolist()}) == 3
    assert torch.equal(found, tokens(calibration="self", sequences=3, sequence_length=12))
    assert not torch.equal(found, tokens(calibration="self", sequences=3, sequence_length=12, seed=1))


@torch.no_grad()
def test_self_is_sampled_from_the_model(tiny_model, make_settings):
    """Sampled text is likelier under the model that wrote it than under another one, and cooler text even likelier."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(initializer_range=0.4, dtype="float32")
    settings = make_settings(folder, calibration="self", sequences=16, sequence_length=40)
    found = calibration_tokens(settings, folder, 272)
    losses = []
    for model in (folder, tiny_model(initializer_range=0.4, dtype="float32", seed=1)):
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(found).logits[:, :-1].log_softmax(-1)
        each = -logits.gather(2, found[:, 1:, None])[:, 5:, 0].mean(1)
        cool = torch.arange(16) % 8 >= 6
        losses.append((float(each[~cool].mean()), float(each[cool].mean())))
        if model == folder:
            assert torch.equal(found[:, 2:5], logits[:, 1:4].argmax(-1))
    assert losses[0][0] < losses[1][0] - 1.0
    assert losses[0][1] < losses[0][0] - 0.3


def test_beginnings_of_self_written_text(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    found = beginnings(tokenizer, 200, 12, 272, torch.Generator().manual_seed(0))
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    assert not set(found[:, 1].tolist()) & set(tokenizer.all_special_ids) and len(found[:, 1].unique()) > 100
    assert (found[:, 2:5] == LIKELIEST).all() and (found[:, 5:] == DRAWN).all()
    assert beginnings(tokenizer, 200, 12, 70, torch.Generator())[:, 1].max() < 70  # what the model knows
    assert beginnings(tokenizer, 2, 3, 272, torch.Generator()).shape == (2, 3)
    tokenizer.bos_token = None
    assert (beginnings(tokenizer, 9, 12, 272, torch.Generator())[:, 1] == LIKELIEST).all()


def test_self_written_answers(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    found = beginnings(tokenizer, 40, 300, 272, torch.Generator().manual_seed(0))
    assert (found[::2, 2:5] == LIKELIEST).all()
    asked = [tokenizer.decode([token for token in row if token >= 0]) for row in found[1::2].tolist()]
    questions = {document[0]["content"] for document in bundled_documents() if not isinstance(document, str)}
    start = tokenizer.bos_token
    for text in asked:
        assert any(f"{start}<user>{question}<answer>".startswith(text.rstrip("\ufffd")) for question in questions)
    assert len(set(asked)) == 20 and sum(text.endswith("<answer>") for text in asked) >= 10
    assert (found[1::2, 150:] == DRAWN).all()  # a long question leaves half of the sequence to the answer


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A local data set with splits train and test and columns text and body."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split, letter in (("train", "a"), ("test", "b")):
        rows = [json.dumps({"text": letter * 40, "body": letter.upper() * 40, "count": 1}) for _ in range(10)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return f"hub:{folder}"


@pytest.mark.parametrize(("suffix", "letter"), [("", "a"), (":test:body", "B"), ("::body", "A")])
def test_hub(tokens, dataset, tiny_model, suffix, letter):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    found = tokens(calibration=dataset + suffix, sequences=2, sequence_length=20)
    assert set(tokenizer.decode(found[:, 1:].flatten())) - {"\n"} == {letter}


@pytest.mark.parametrize("suffix", [":validation", ":train:count"])
def test_hub_wrong_part(tokens, dataset, suffix):
    with pytest.raises(ValueError, match="data set hub:.* cannot be read .*: check its name, split and column"):
        tokens(calibration=dataset + suffix)


def test_hub_unknown(tokens, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="data set hub:nobody/nothing cannot be read"):
        tokens(calibration="hub:nobody/nothing")
    (tmp_path / "data" / "train.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match="data set hub:.* cannot be read"):
        tokens(calibration=dataset)


def test_hub_without_the_package(tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hub:x needs the package datasets: pip install 'quip-vllm.quantize.'"):
        tokens(calibration="hub:x")


def test_self_of_a_broken_model_is_refused(damaged, make_settings):
    folder = damaged(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    settings = make_settings(folder, calibration="self", sequences=2, sequence_length=4)
    with pytest.raises(ValueError, match="logits hold a NaN or an infinity: mend its weights"):
        calibration_tokens(settings, folder, 272)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])  # every other layer of the second has a window
def test_a_reserved_cache_changes_no_bit(tiny_model, architecture):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(reserved):
        out = model(ids[:, :3], use_cache=True)
        found, cache = [out.logits], out.past_key_values
        if reserved:
            reserve(cache, 12)
        for i in range(3, 12):
            found.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1), [type(layer).__name__ for layer in cache.layers]

    usual, reserved = logits(False), logits(True)
    assert torch.equal(usual[0], reserved[0])
    assert "Reserved" in reserved[1]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Mistral"])  # tied head; biases; a head of its own
def test_prepacked_layers_give_the_same_logits(tiny_model, architecture):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (5, 3), generator=torch.Generator().manual_seed(0))
    usual = model(ids).logits
    prepack(model, 5)
    for rows in (ids, ids[:, :1]):  # other numbers of rows than the layout was made for, too
        torch.testing.assert_close(
            model(rows).logits, usual[:, : rows.shape[1]], rtol=FLOAT32_LAYERS, atol=FLOAT32_LAYERS
        )
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(module.weight.is_mkldnn == torch.backends.mkldnn.is_available() for module in linears)
