"""Write a model as a folder that transformers and this package can load.

The folder of a modular model contains the backbone's weights, or the path that they load from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mode.core.errors import ConfigError
from mode.core.escape import escape_markdown, format_code
from mode.core.files import write_atomic

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "*.model")
"""Patterns of the names of tokenizer files."""


CARD = """# {title}

{what}

```python
from mode.modular.model import MoDEForCausalLM  # registers the model with the Auto classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""


def write_model(
    model: Any, place: Path, folder: Path, *, embed: bool, precision: str = "fp32", title: str = "Model"
) -> None:
    """Write a model, its tokenizer and a model card, atomically: the folder appears complete or not at all.

    Args:
        model: The model; its weights are cast in place.
        place: Folder of the tokenizer's files.
        folder: Folder to write. It must be empty or not exist.
        embed: Whether the folder of a modular model includes the backbone's weights.
        precision: Precision of the weights: `fp32` or `bf16`.
        title: Heading of the card.

    Raises:
        ConfigError: The folder is not empty, its parent does not exist, or no class of transformers can load the model.
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
        text = CARD.format(title=escape_markdown(title), what=describe_model(model, embed=embed), folder=folder.name)
        write_atomic(partial / "README.md", text.encode())
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_loads(model: Any, title: str) -> None:
    """Refuse a model with parameters that its class in `transformers` does not have."""
    import torch
    from transformers import AutoModelForCausalLM

    if model.config.model_type == "mode":
        return
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    if set(plain.state_dict()) != set(model.state_dict()):
        raise ConfigError(
            f"{title}: no class of transformers can load this model; use its run with mode generate or mode eval"
        )


def check_vacant(folder: Path) -> None:
    """Refuse a folder that is not empty, or whose parent does not exist."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not empty; choose a new folder")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder}: no folder {folder.absolute().parent}")


def describe_model(model: Any, *, embed: bool) -> str:
    """Return the description of a model for its card."""
    if model.config.model_type != "mode":
        return f"A causal LM of the {model.config.model_type} family."
    source = model.config.backbone
    origin = (
        f"{format_code(str(source['name']))} (weights {source['fingerprint']})" if source else "an unnamed backbone"
    )
    path = format_code(str(source.get("path")))
    where = "are in this folder" if embed else f"are not in this folder; they are loaded from {path}"
    shape = f"{model.config.expert_layers} layers in each of {model.config.num_blocks} blocks"
    return (
        f"A modular model (MoDE): the backbone {origin} with experts for {', '.join(model.config.experts)}, {shape}. "
        f"The backbone's weights {where}."
    )
