"""Write a model as a folder that transformers and this package can load.

The folder of a modular model contains the backbone's weights, or the path that they load from.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mode.artefacts.reload import check_reload
from mode.backbone.tokenizer import BackboneTokenizer, save_bos
from mode.core.digests import INDEX, describe_files, write_sealed
from mode.core.errors import ConfigError
from mode.core.escape import escape_markdown, format_code
from mode.core.files import sync_files, write_atomic, write_partial

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*",
)
"""Patterns of the paths of tokenizer files."""


CARD = """# {title}

{what}

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```
"""


REGISTER = "from mode.modular.model import MoDEForCausalLM  # registers the model with the Auto classes\n"
"""Line in the card of a modular model."""


def write_model(
    model: Any,
    place: Path,
    folder: Path,
    *,
    embed: bool,
    precision: str = "fp32",
    title: str = "Model",
    tokenizer: BackboneTokenizer | None = None,
) -> None:
    """Write a model, its tokenizer and a model card, atomically: the folder appears complete or not at all.

    The written model is loaded in a new process first, and must have the logits of the given model.

    Args:
        model: The model; its weights are cast in place.
        place: Folder of the tokenizer's files.
        folder: Folder to write. It must be empty or not exist.
        embed: Whether the folder of a modular model includes the backbone's weights.
        precision: Precision of the weights: `fp32` or `bf16`.
        title: Heading of the card.
        tokenizer: Tokenizer of the model. If the backbone's settings decide about the beginning-of-sequence token, the
            written tokenizer does as they say.

    Raises:
        ConfigError: The folder is not empty, its parent does not exist, no class of transformers can load the model,
            the written model is another one once loaded, or the disk is full.
    """
    import torch

    from mode.core.tensors import count_bytes

    check_vacant(folder)
    check_loads(model, title)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    modular = model.config.model_type == "mode"
    tensors = model.own_state().values() if modular and not embed else model.parameters()
    with write_partial(folder, count_bytes(tensors)) as partial:
        partial.mkdir()
        copy_tokenizer(place, partial, tokenizer)
        model.save_pretrained(partial, **({"embed": embed} if modular else {}))
        text = describe_loading(title, folder.name, describe_model(model, embed=embed), modular=modular)
        write_atomic(partial / "README.md", text.encode())
        weights = [path.name for path in partial.glob("*.safetensors")]
        write_sealed(partial / INDEX, {"files": describe_files(partial, weights)})
        check_reload(model, partial, folder)
        if folder.exists():
            folder.rmdir()
        sync_files(partial)
        os.replace(partial, folder)


def describe_loading(title: str, folder: str, what: str, *, modular: bool) -> str:
    """Return the card of a model: its heading, what it is, and how to load it from its folder."""
    named = json.dumps(folder, ensure_ascii=False)
    return CARD.format(title=escape_markdown(title), what=what, imports=REGISTER if modular else "", folder=named)


def copy_tokenizer(place: Path, target: Path, tokenizer: BackboneTokenizer | None) -> None:
    """Copy the files of a tokenizer. With a tokenizer given, the copied one begins texts as the given one does."""
    for pattern in TOKENIZER:
        for path in place.glob(pattern):
            copy = target / path.relative_to(place)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if tokenizer is not None:
        save_bos(tokenizer, target)


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
