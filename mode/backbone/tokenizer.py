"""Load, train and save the tokenizer of a backbone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.backbone.load import CONFIG, locate, read_settings
from mode.config.backbone import Backbone
from mode.core.errors import ConfigError
from mode.core.files import remove, sync_files, write_partial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EOS = "<|endoftext|>"


class BackboneTokenizer:
    """The tokenizer of a backbone.

    Attributes:
        backend: Tokenizer of the `tokenizers` library.
        eos_id: Id of the end-of-sequence token, which ends every document.
        vocab_size: Number of ids.
        embeddings: Number of ids that the backbone has an embedding for.
        fingerprint: Digest of the serialised tokenizer.
    """

    def __init__(self, backend: Any, eos_id: int | None, embeddings: int | None = None) -> None:
        """Wrap a tokenizer of the `tokenizers` library, without truncation and padding.

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
        self.vocab_size = int(backend.get_vocab_size())
        self.embeddings = self.vocab_size if embeddings is None else embeddings
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]
        if self.vocab_size > self.embeddings:
            added = backend.get_added_tokens_decoder()
            needed = [number for number, token in added.items() if not token.special]
            largest = max(eos_id, backend.get_vocab_size(with_added_tokens=False) - 1, *needed)
            if largest >= self.embeddings:
                raise ConfigError(
                    f"the tokenizer has ids up to {largest}, and {CONFIG} has vocab_size {self.embeddings}: "
                    "the tokenizer belongs to another model"
                )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise documents, without special tokens.

        Raises:
            ConfigError: A document contains a token that the backbone has no embedding for.
        """
        documents = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        if self.vocab_size > self.embeddings:
            largest = max((number for ids in documents for number in ids), default=0)
            if largest >= self.embeddings:
                raise ConfigError(
                    f"the text contains {self.backend.id_to_token(largest)}, token {largest}, "
                    f"and the backbone has embeddings for {self.embeddings} tokens"
                )
        return documents

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
        backend, eos_id = read_tokenizer(folder)
        decoder = settings.get("decoder", settings)  # of a modular model
        embeddings = decoder.get("vocab_size")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone {backbone.name}: no tokenizer at {backbone.path}: {reason}") from error
    try:
        return BackboneTokenizer(backend, eos_id, embeddings)
    except ConfigError as error:
        raise ConfigError(f"backbone {backbone.name}: {folder}: {error}") from error


def read_tokenizer(folder: Path) -> tuple[Any, int | None]:
    """Return the tokenizer in a folder, and the id of its end-of-sequence token if it has one."""
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").exists():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if backend.token_to_id(EOS) is not None:
            return backend, backend.token_to_id(EOS)
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return auto.backend_tokenizer, auto.eos_token_id


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
