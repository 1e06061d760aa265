"""A world for tests: three small domains, a pico backbone, and folders of its own, all made on the fly."""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "200"
os.environ["TERM"] = "dumb"

import pytest

gc.disable()  # while libraries are loaded
DOMAINS = ("py", "sums", "prose")
SPLITS = "{test: 0.2, validation: 0.2, train: 0.4, pretrain: 0.2}"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage again, and look no more through what has been loaded until now: it stays, and is a lot."""
    gc.freeze()
    gc.enable()


def documents(domain: str, count: int = 120) -> list[str]:
    """Return distinct documents that look like a domain."""
    rng = random.Random(domain)
    words = [
        "the",
        "king",
        "said",
        "to",
        "her",
        "that",
        "day",
        "light",
        "water",
        "house",
        "of",
        "and",
        "in",
        "stone",
        "went",
        "far",
    ]
    made = []
    for number in range(count):
        if domain == "py":
            made.append(
                "\n".join(f"def f{rng.randrange(999)}(x):\n    return x + {rng.randrange(99)}" for _ in range(6))
            )
        elif domain == "sums":
            pairs = [(rng.randrange(99), rng.randrange(99)) for _ in range(8)]
            made.append("\n".join(f"Question: {a} + {b} = ?\nAnswer: {a + b}" for a, b in pairs))
        else:
            made.append(f"{number}. " + " ".join(rng.choice(words) for _ in range(60)) + ".")
    return made


def make_backbone(folder: Path, *, num_layers: int = 6, hidden_size: int = 16, vocab_size: int = 300) -> None:
    """Write a pico Llama with random weights and a tokenizer of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mode.backbone.tokenizer import save_backbone, train_tokenizer

    texts = [text for domain in DOMAINS for text in documents(domain, 40)]
    tokenizer = train_tokenizer(texts, vocab_size)
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    save_backbone(model, tokenizer, folder)


@dataclass(frozen=True)
class World:
    """A folder with a configuration of its own, a pico backbone and three domains.

    Attributes:
        root: The folder.
        conf: Configuration folder, for `--conf`.
        overrides: Settings that make every run tiny and keep it in the folder.
    """

    root: Path
    conf: Path
    overrides: tuple[str, ...]

    def at(self, folder: Path) -> World:
        """Return the same world with runs and results in another folder; prepared data are shared."""
        kept = [text for text in self.overrides if not text.startswith(("paths.runs", "paths.results"))]
        return World(folder, self.conf, (*kept, f"paths.runs={folder}/runs", f"paths.results={folder}/results"))


def make_world(root: Path) -> World:
    """Write a world into a folder."""
    conf = root / "conf"
    for group in ("domain", "backbone", "table", "experiment", "method"):
        (conf / group).mkdir(parents=True)
    for domain in DOMAINS:
        path = root / f"{domain}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(domain)), encoding="utf-8")
        (conf / "domain" / f"{domain}.yaml").write_text(
            f"description: test domain {domain}\nlicence: CC0-1.0\n"
            f"sources: [{{kind: files, paths: ['{path}']}}]\nsplits: {SPLITS}\n",
            encoding="utf-8",
        )
    make_backbone(root / "pico")
    (conf / "backbone" / "pico.yaml").write_text(f"name: pico\npath: {root}/pico\nrevision: null\n", encoding="utf-8")
    overrides = (
        "backbone=pico",
        "targets=[py,sums]",
        "evaluate.domains=[sums,py,prose]",
        "evaluate.batch_size=64",
        "train.steps=4",
        "train.batch.size=2",
        "train.sequence_length=32",
        "train.log_every=2",
        "train.checkpoint_every=2",
        "track=none",
        f"paths.runs={root}/runs",
        f"paths.results={root}/results",
        f"paths.cache={root}/cache",
    )
    return World(root, conf, overrides)


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Make the world once per session."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(shared_world: World, tmp_path: Path) -> World:
    """Return the world with runs and results of the test's own."""
    return shared_world.at(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def quick_reloads() -> Iterator[None]:
    """Load written models in processes that are forked from one that has imported the libraries."""
    from mode.artefacts import reload
    from tests.support.processes import reload_in_fork

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "subprocess", SimpleNamespace(run=reload_in_fork))
        yield


@pytest.fixture(scope="module")
def composed_once() -> Iterator[None]:
    """Compose every configuration once in a module that composes the same ones over and over."""
    from mode.config.compose import compose

    genuine = functools.cache(compose)
    with pytest.MonkeyPatch.context() as patch:
        for module in [each for name, each in sys.modules.items() if name.startswith(("mode.", "cli.", "tests."))]:
            if getattr(module, "compose", None) is compose:
                patch.setattr(module, "compose", lambda overrides, extra=None: genuine(tuple(overrides), extra))
        yield
