"""What a tokenizer's files declare: the token that begins every document, and the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mode.backbone.tokenizer import load_tokenizer, save_bos
from mode.config.backbone import Backbone
from mode.config.compose import compose
from tests.support.recite import BOS, EOS, TURN, make_tokenizer, write_reciter
from tests.support.refusals import refused


def write(folder: Path, *, prepends: bool = False, settings: dict[str, Any] | None = None) -> Path:
    write_reciter(folder, make_tokenizer("a b", bos=prepends), [EOS], settings)
    return folder


def load(folder: Path, bos: Any = "auto") -> Any:
    return load_tokenizer(Backbone(name="it", path=str(folder), bos=bos))


@pytest.mark.parametrize("prepends", [False, True])
def test_documents_begin_as_the_tokenizer_itself_begins_them(tmp_path: Path, prepends: bool) -> None:
    folder = write(tmp_path, prepends=prepends)
    expected = AutoTokenizer.from_pretrained(folder)("a b")["input_ids"]
    assert (expected[0] == BOS) is prepends
    assert load(folder).encode(["a b"]) == [expected]
    plain = [token for token in expected if token != BOS]
    assert load(folder, bos=False).encode(["a b"]) == [plain]
    assert load(folder, bos=True).encode(["a b"]) == [[BOS, *plain]]


def test_a_text_that_spells_the_first_token_does_not_begin_with_two(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, prepends=True))
    assert tokenizer.encode(["<s>a b", ""]) == [tokenizer.encode(["a b"])[0], [BOS]]
    assert tokenizer.decode(tokenizer.encode(["a b"])[0]) == "a b"


@pytest.mark.parametrize("prepends", [False, True])
@pytest.mark.parametrize("bos", [False, True, "auto"])
def test_a_saved_tokenizer_begins_texts_as_the_settings_said(tmp_path: Path, prepends: bool, bos: Any) -> None:
    asked = load(write(tmp_path, prepends=prepends), bos)
    save_bos(asked, tmp_path)
    assert load(tmp_path).encode(["a b"]) == asked.encode(["a b"])
    assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == asked.encode(["a b"])[0]


def test_only_a_token_that_is_used_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert load(folder).fingerprint == load(folder, bos=False).fingerprint != load(folder, bos=True).fingerprint


def test_the_embedded_backbone_begins_no_document_with_a_token() -> None:
    tokenizer = load_tokenizer(compose(["backbone=tiny"]).backbone)
    assert tokenizer.bos_id is None
    assert tokenizer.ends == {tokenizer.eos_id}


def test_a_first_token_that_the_tokenizer_does_not_name_is_refused(tmp_path: Path) -> None:
    with refused("backbone.bos=true", "it", "bos_token"):
        load(write(tmp_path, settings={"bos_token": None}), bos=True)


@pytest.mark.parametrize(
    ("generation", "settings", "ends"),
    [
        (None, {}, {EOS}),
        ({"eos_token_id": TURN}, {}, {EOS, TURN}),
        ({"eos_token_id": [EOS, TURN]}, {}, {EOS, TURN}),
        ({"eos_token_id": None}, {"eos_token": "<end_of_turn>"}, {TURN}),
        ({}, {"eos_token": {"content": "<end_of_turn>"}}, {EOS, TURN}),
    ],
)
def test_every_declared_end_ends_a_text(tmp_path: Path, generation: Any, settings: Any, ends: set[int]) -> None:
    folder = write(tmp_path, settings=settings)
    tokenizer = make_tokenizer("a b")
    tokenizer.add_special_tokens(["<|endoftext|>"])  # ends documents; the files name other tokens
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": tokenizer.get_vocab_size()}), "utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    loaded = load(folder)
    assert loaded.eos_id == tokenizer.token_to_id("<|endoftext|>")
    assert loaded.ends == ends | {loaded.eos_id}


@pytest.mark.parametrize("text", ["[1]", "{", '{"eos_token_id": "5"}', '{"eos_token_id": [true]}'])
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / "generation_config.json").write_text(text, "utf-8")
    with refused("generation_config.json"):
        load(tmp_path)


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with refused("UTF-8"):
        load(write(tmp_path)).encode(["a", "ros\udcff"])
