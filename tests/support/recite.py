"""A tokenizer whose decoder drops the first space, and models that recite a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT = 24
SPECIAL = ("<unk>", "<s>", "</s>", "<end_of_turn>")
UNK, BOS, EOS, TURN = range(4)


def make_tokenizer(*texts: str, bos: bool = False) -> Tokenizer:
    """Return a tokenizer of the words of some texts, with SentencePiece's mark in the place of spaces.

    Args:
        texts: Texts that the tokenizer encodes without loss.
        bos: Whether the tokenizer prepends `<s>` to every text.
    """
    split = pre_tokenizers.Metaspace(prepend_scheme="always")
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocab = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Metaspace(prepend_scheme="always")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def write_reciter(
    folder: Path, tokenizer: Tokenizer, tokens: Sequence[int], settings: dict[str, Any] | None = None
) -> None:
    """Write a GPT-2 whose next token depends on its position alone, with its tokenizer.

    Args:
        folder: Folder to write.
        tokenizer: The tokenizer.
        tokens: The token that follows every position; the last one repeats.
        settings: Content of `tokenizer_config.json` besides the special tokens.
    """
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=CONTEXT,
        n_embd=CONTEXT,
        n_layer=1,
        n_head=1,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in [*model.transformer.h.parameters(), model.transformer.wte.weight, model.lm_head.weight]:
            parameter.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(CONTEXT))
        for position in range(CONTEXT):
            model.lm_head.weight[tokens[min(position, len(tokens) - 1)], position] = 1.0
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain | (settings or {})), "utf-8")


def write_continuation(folder: Path, prompt: str, continuation: str, *, bos: bool = False) -> None:
    """Write a model that continues a prompt with a text and then ends, with its tokenizer."""
    tokenizer = make_tokenizer(prompt + continuation, bos=bos)
    given, whole = tokenizer.encode(prompt).ids, tokenizer.encode(prompt + continuation).ids
    assert whole[: len(given)] == given
    assert UNK not in whole
    write_reciter(folder, tokenizer, [*whole[1:], EOS])
