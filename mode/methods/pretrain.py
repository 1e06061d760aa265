"""Pretrain a small backbone from scratch, tokenizer included, with the same loop as everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.tokenizer import EOS, BackboneTokenizer, save_backbone, train_tokenizer
from mode.config.base import STRICT
from mode.config.data import Split
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import expand_home, write_atomic
from mode.data.pack import make_state_key
from mode.data.sources import read_documents
from mode.data.split import split_documents
from mode.methods.base import Material, Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

PositiveInt = Annotated[int, Field(gt=0)]


@settings(frozen=True, kw_only=True, config=STRICT)
class Pretrain(Method):
    """A Llama-architecture model trained on the pretraining splits, which adaptation never trains on.

    Attributes:
        weights: Rows of each target domain in a cycle of the mix.
        vocab_size: Ids of the byte-level BPE, trained on the same splits.
        hidden_size: d.
        intermediate_size: Width of the feed-forward layers.
        num_layers: L.
        num_heads: Attention heads, each with its own keys and values.
        context: Longest sequence that the model is declared for.
    """

    recorded_as: ClassVar[str] = "mode.pretrain.Pretrain"
    family: ClassVar[str] = "reference"
    source: ClassVar[str] = "common practice"

    split: ClassVar[Split] = "pretrain"
    weights: dict[str, PositiveInt]
    vocab_size: Annotated[int, Field(ge=257)]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    context: PositiveInt

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads of even size")

    def check(self, run: Run) -> None:
        """Check that the mix consists of the run's targets.

        Raises:
            ConfigError: The weights name other domains.
        """
        if set(self.weights) != set(run.targets):
            raise ConfigError(
                f"method.weights name {', '.join(self.weights)}, but targets={list(run.targets)}: they must agree"
            )
        for name in self.weights:
            if not run.domains[name].splits.get("pretrain"):
                raise ConfigError(f"domain {name} has no pretrain split, so nothing can be pretrained on it")

    def tokenizer(self, run: Run) -> BackboneTokenizer:
        """Train the tokenizer on the pretraining splits, or read it from the cache."""
        from tokenizers import Tokenizer

        self.check(run)
        cache = expand_home(run.paths.cache)
        states = [make_state_key(run.domains[name]) for name in self.weights]
        path = cache / "tokenizers" / f"{self.vocab_size}-{'-'.join(states)}.json"
        if not path.exists():
            texts: list[str] = []
            for name in self.weights:
                domain = run.domains[name]
                texts += split_documents(read_documents(domain, cache), domain.splits).documents["pretrain"]
            trained = train_tokenizer(texts, self.vocab_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, trained.backend.to_str(pretty=True).encode())
        backend = Tokenizer.from_file(str(path))
        return BackboneTokenizer(backend, backend.token_to_id(EOS))

    def backbone_fingerprint(self, run: Run) -> str:
        """Return `none`: the weights are initialised from the seed."""
        return "none"

    def pretraining_data(self, run: Run) -> dict[str, str]:
        """Return nothing: no weights are loaded."""
        return {}

    def backbone_size(self, run: Run) -> int:
        """Return 0: no weights are loaded."""
        return 0

    def mixture(self, run: Run) -> dict[str, int]:
        """Return the mix of the settings."""
        return dict(self.weights)

    def old_text(self, run: Run) -> tuple[str, ...]:
        """Return nothing: there is no earlier training."""
        return ()

    def order(self, run: Run) -> int:
        """Return 0, the order that the embedded backbone was trained with."""
        return 0

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return a freshly initialised model with tied embeddings."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(run.seed)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the backbone as a Hugging Face folder, with a note of how it was made."""
        save_backbone(model, self.tokenizer(run), folder / "backbone")
        write_atomic(
            folder / "backbone" / "pretraining.json", json.dumps(dict(about), indent=1, sort_keys=True).encode()
        )
