"""Write a model as a folder that transformers and this package load: whole, or on a backbone that is elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mode.core.errors import ConfigError
from mode.core.files import write_atomic

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "*.model")
"""Files of a tokenizer, as the libraries name them."""


CARD = """# {title}

{what}

```python
from mode.modular.model import MoDEForCausalLM  # registers the model with the Auto classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


def write_model(
    model: Any, place: Path, folder: Path, *, embed: bool, precision: str = "fp32", title: str = "Model"
) -> None:
    """Write a model, its tokenizer and a card; the folder appears whole or not at all.

    Args:
        model: The model; cast in place.
        place: Folder of the tokenizer's files.
        folder: Folder to write; it must not exist, or be empty.
        embed: Whether a modular model's folder holds its backbone's weights too.
        precision: `fp32` or `bf16`.
        title: Heading of the card.

    Raises:
        ConfigError: There is something in the folder, or no folder to put it in, or no class would load the model.
    """
    import torch

    check_vacant(folder)
    check_loads(model, title)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    modular = model.config.model_type == "mode"
    try:
        partial.mkdir()
        for pattern in TOKENIZER:
            for path in place.glob(pattern):
                shutil.copyfile(path, partial / path.name)
        model.save_pretrained(partial, **({"embed": embed} if modular else {}))
        text = CARD.format(title=title, what=describe_model(model, embed=embed), folder=folder.name)
        write_atomic(partial / "README.md", text.encode())
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_loads(model: Any, title: str) -> None:
    """Refuse a model with parts that its class in `transformers` has not: its folder would load as another."""
    import torch
    from transformers import AutoModelForCausalLM

    if model.config.model_type == "mode":
        return
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    if set(plain.state_dict()) != set(model.state_dict()):
        raise ConfigError(f"{title}: no class of transformers loads such a model; generate and eval take its run")


def check_vacant(folder: Path) -> None:
    """Refuse a folder that holds something, or has no parent."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder}: there is something already; choose a new folder")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder}: no folder {folder.absolute().parent}")


def describe_model(model: Any, *, embed: bool) -> str:
    """Say in a card what a model is."""
    if model.config.model_type != "mode":
        return f"A causal LM of the {model.config.model_type} family."
    source = model.config.backbone
    origin = f"`{source['name']}` (weights {source['fingerprint']})" if source else "an unnamed backbone"
    where = "are in this folder" if embed else f"are not in this folder: they load from `{source.get('path')}`"
    shape = f"{model.config.expert_layers} layers in each of {model.config.num_blocks} blocks"
    return (
        f"A modular model (MoDE): the backbone {origin} with experts for {', '.join(model.config.experts)}, {shape}. "
        f"The backbone's weights {where}."
    )
