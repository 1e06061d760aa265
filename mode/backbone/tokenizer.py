"""Load, train and save the tokenizer of a backbone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.backbone.load import locate
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
        fingerprint: Digest of the serialised tokenizer.
    """

    def __init__(self, backend: Any, eos_id: int | None) -> None:
        """Wrap a tokenizer of the `tokenizers` library, without truncation and padding.

        Raises:
            ConfigError: The tokenizer has no end-of-sequence token.
        """
        if eos_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; every document must end with one")
        backend.no_truncation()  # some tokenizers are saved with a maximum length
        backend.no_padding()
        self.backend = backend
        self.eos_id = eos_id
        self.vocab_size = int(backend.get_vocab_size())
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise documents, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return str(self.backend.decode(ids))


def load_tokenizer(backbone: Backbone) -> BackboneTokenizer:
    """Load a backbone's tokenizer.

    Raises:
        ConfigError: The tokenizer is missing, cannot be read, or has no end-of-sequence token.
    """
    from tokenizers import Tokenizer

    folder = locate(backbone)
    try:
        if (folder / "tokenizer.json").exists():
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            if backend.token_to_id(EOS) is not None:
                return BackboneTokenizer(backend, backend.token_to_id(EOS))
        from transformers import AutoTokenizer

        auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone {backbone.name}: no tokenizer at {backbone.path}: {reason}") from error
    return BackboneTokenizer(auto.backend_tokenizer, auto.eos_token_id)


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
