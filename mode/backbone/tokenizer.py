"""Load, train and save the tokenizer of a backbone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.backbone.load import CONFIG, locate, read_settings
from mode.config.backbone import Backbone
from mode.core.errors import ConfigError, summarize_error
from mode.core.files import read_json, remove, sync_files, write_partial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EOS = "<|endoftext|>"


class BackboneTokenizer:
    """The tokenizer of a backbone.

    Attributes:
        backend: Tokenizer of the `tokenizers` library.
        eos_id: Id of the end-of-sequence token, which ends every document.
        bos_id: Id of the beginning-of-sequence token, which begins every document; None for backbones without one.
        ends: Ids of the tokens that end a generated text.
        vocab_size: Number of ids.
        embeddings: Number of ids that the backbone has an embedding for.
        fingerprint: Digest of the serialised tokenizer, and of the beginning-of-sequence token if there is one.
    """

    def __init__(
        self,
        backend: Any,
        eos_id: int | None,
        bos_id: int | None = None,
        ends: Iterable[int] = (),
        embeddings: int | None = None,
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` library, without truncation and padding.

        Args:
            backend: The tokenizer.
            eos_id: Id of the end-of-sequence token.
            bos_id: Id of the beginning-of-sequence token; None if no document begins with one.
            ends: Ids of further tokens that end a generated text.
            embeddings: Number of ids that the backbone has an embedding for; by default, all.

        Raises:
            ConfigError: The tokenizer has no end-of-sequence token, or the backbone lacks embeddings for its ids. Only
                special tokens may lack one, such as the image token of Gemma 3, as long as no text contains them.
        """
        if eos_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; every document must end with one")
        backend.no_truncation()  # some tokenizers are saved with a maximum length
        backend.no_padding()
        self.backend = backend
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.ends = frozenset({eos_id, *ends})
        self.vocab_size = int(backend.get_vocab_size())
        self.embeddings = self.vocab_size if embeddings is None else embeddings
        state = backend.to_str() + ("" if bos_id is None else f" bos {bos_id}")
        self.fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]
        self.check_embeddings()

    def check_embeddings(self) -> None:
        """Check that the backbone has an embedding for every token that is not a special token.

        Raises:
            ConfigError: It lacks one.
        """
        if self.vocab_size > self.embeddings:
            added = self.backend.get_added_tokens_decoder()
            needed = [number for number, token in added.items() if not token.special]
            largest = max(self.eos_id, self.backend.get_vocab_size(with_added_tokens=False) - 1, *needed)
            if largest >= self.embeddings:
                raise ConfigError(
                    f"the tokenizer has ids up to {largest}, and {CONFIG} has vocab_size {self.embeddings}: "
                    "the tokenizer belongs to another model"
                )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise documents. No special token is added except the backbone's beginning-of-sequence token.

        Raises:
            ConfigError: A text cannot be encoded as UTF-8, or contains a token that the backbone has no embedding for.
        """
        try:
            ids = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            raise ConfigError("cannot tokenise a text that is not valid UTF-8 (unpaired surrogate)") from error
        if self.vocab_size > self.embeddings:
            largest = max((number for each in ids for number in each), default=0)
            if largest >= self.embeddings:
                raise ConfigError(
                    f"the text contains {self.backend.id_to_token(largest)}, token {largest}, "
                    f"and the backbone has embeddings for {self.embeddings} tokens"
                )
        if self.bos_id is None:
            return ids
        return [each if each[:1] == [self.bos_id] else [self.bos_id, *each] for each in ids]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return str(self.backend.decode(ids))


def load_tokenizer(backbone: Backbone) -> BackboneTokenizer:
    """Load a backbone's tokenizer.

    Raises:
        ConfigError: The tokenizer is missing, cannot be read, has no end-of-sequence token, or does not fit the
            backbone.
    """
    folder = locate(backbone)
    settings = read_settings(folder)
    try:
        backend, eos_id = load_backend(folder)
    except Exception as error:
        reason = summarize_error(error)
        raise ConfigError(f"backbone {backbone.name}: no tokenizer at {backbone.path}: {reason}") from error
    embeddings = settings.get("decoder", settings).get("vocab_size")  # a modular model has a decoder
    bos, ends = find_bos(backbone, backend, folder), find_ends(backend, folder)
    try:
        return BackboneTokenizer(backend, eos_id, bos, ends, embeddings)
    except ConfigError as error:
        raise ConfigError(f"backbone {backbone.name}: {folder}: {error}") from error


def load_backend(folder: Path) -> tuple[Any, int | None]:
    """Load a tokenizer of the `tokenizers` library from a folder; return it, and its end-of-sequence token."""
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").exists():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if backend.token_to_id(EOS) is not None:
            return backend, backend.token_to_id(EOS)
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return auto.backend_tokenizer, auto.eos_token_id


def find_bos(backbone: Backbone, backend: Any, folder: Path) -> int | None:
    """Return the token that begins every document of a backbone; None if there is none.

    With `bos: auto`, documents begin with a beginning-of-sequence token if the tokenizer itself prepends one.

    Raises:
        ConfigError: The backbone's settings ask for a token that the tokenizer does not have.
    """
    prepended = find_prepended(backend)
    if backbone.bos is False or backbone.bos == "auto" or prepended is not None:
        return None if backbone.bos is False else prepended
    named = find_token(backend, read_optional(folder / "tokenizer_config.json").get("bos_token"))
    if named is None:
        raise ConfigError(f"backbone.bos=true: the tokenizer of {backbone.name} names no bos_token")
    return named


def find_prepended(backend: Any) -> int | None:
    """Return the special token that a tokenizer prepends to every text; None if it prepends none."""
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return full[0] if plain and full[1 : 1 + len(plain)] == plain and full[:1] != plain[:1] else None


def save_bos(tokenizer: BackboneTokenizer, folder: Path) -> None:
    """Make the tokenizer in a folder begin texts as the backbone's settings say, if it does not do so by itself."""
    from tokenizers import Tokenizer, processors

    if find_prepended(tokenizer.backend) == tokenizer.bos_id:
        return
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    bos = [] if tokenizer.bos_id is None else [(backend.id_to_token(tokenizer.bos_id), tokenizer.bos_id)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*(token for token, _ in bos), "$A"], special_tokens=bos
    )
    backend.save(str(folder / "tokenizer.json"))


def find_ends(backend: Any, folder: Path) -> list[int]:
    """Return the tokens that end a text according to `generation_config.json` and `tokenizer_config.json`.

    Without `eos_token_id` in `generation_config.json`, that of `config.json` counts, as in `transformers`.

    Raises:
        ConfigError: `eos_token_id` is not a token or a list of tokens.
    """
    declared: Any = None
    for name in ("config.json", "generation_config.json"):
        declared = read_optional(folder / name).get("eos_token_id", declared)
        ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
        if not all(type(token) is int for token in ids):
            raise ConfigError(f"{folder / name}: eos_token_id {declared!r} is neither a token id nor a list of them")
    named = find_token(backend, read_optional(folder / "tokenizer_config.json").get("eos_token"))
    return ids if named is None else [*ids, named]


def find_token(backend: Any, token: Any) -> int | None:
    """Return the id of a special token as `tokenizer_config.json` has it: a text, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None


def read_optional(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a backbone; nothing if there is no such file.

    Raises:
        ConfigError: The file is not a JSON object.
    """
    return read_json(path) if path.exists() else {}


def train_tokenizer(texts: list[str], vocab_size: int) -> BackboneTokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: Documents of the pretraining split.
        vocab_size: Number of ids, including the end-of-sequence token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BackboneTokenizer(backend, backend.token_to_id(EOS))


def save_backbone(model: PreTrainedModel, tokenizer: BackboneTokenizer, folder: Path) -> None:
    """Write a backbone and its tokenizer to a folder that Hugging Face tools can load. An existing folder is replaced.

    Raises:
        ConfigError: The disk is full.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    from mode.core.tensors import count_bytes

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_partial(folder, count_bytes(model.parameters())) as partial:
        model.save_pretrained(partial)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token=EOS, bos_token=EOS)
        wrapped.save_pretrained(partial)
        tokenizer.backend.save(str(partial / "tokenizer.json"))
        sync_files(partial)
        remove(folder)
        os.replace(partial, folder)
