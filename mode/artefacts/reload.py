"""Load a written model in a new process, and compare its logits with those of the model in memory.

`python -m mode.artefacts.reload FOLDER GIVEN FOUND` is the new process: it loads the model as a user would, and writes
the logits of the ids in the file GIVEN to the file FOUND.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.backbone.load import CONFIG
from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 16
"""Length of the row of ids. One short row exercises all weights except those of other ids."""


TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 2e-2}
"""Largest difference of logits, as a share of the largest logit."""


def check_reload(model: Any, folder: Path, name: object) -> None:
    """Check that a written model, loaded in a new process, has the data type and the logits of the model in memory.

    Args:
        model: The model in memory, on the CPU.
        folder: Folder that the model was written to.
        name: Name of the model in messages.

    Raises:
        ConfigError: The written model cannot be loaded, or is another model.
    """
    import torch

    from mode.core.tensors import load_tensors, save_tensors

    ids = torch.arange(TOKENS).unsqueeze(0) * 7919 % model.get_input_embeddings().num_embeddings
    expected = compute_logits(model, ids)
    with tempfile.TemporaryDirectory() as work:
        given, found = Path(work) / "given.safetensors", Path(work) / "found.safetensors"
        save_tensors(given, {"ids": ids}, {})
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(folder), str(given), str(found)],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(torch.get_num_threads())},
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ConfigError(f"{name}: not written, because the model cannot be loaded in a new process: {reason}")
        logits = load_tensors(found)[0]["logits"]
    largest = expected.float().nan_to_num().abs().max().item()
    bound = TOLERANCE.get(str(expected.dtype), TOLERANCE["torch.float32"]) * largest
    if logits.dtype != expected.dtype:
        raise ConfigError(f"{name}: not written, because the model loads as {logits.dtype}, not as {expected.dtype}")
    if not torch.allclose(logits.float(), expected.float(), rtol=0.0, atol=bound, equal_nan=True):
        difference = (logits.float() - expected.float()).abs().max().item()
        raise ConfigError(
            f"{name}: not written, because the model has other logits once loaded: they differ by {difference:.2g}, "
            f"the largest is {largest:.2g}"
        )


def compute_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of ids, without dropout."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return logits


def write_logits(folder: Path, given: Path, found: Path) -> None:
    """Load a model with the Auto class of `transformers` and write the logits of ids."""
    from transformers import AutoModelForCausalLM

    from mode.core.tensors import load_tensors, save_tensors

    if json.loads((folder / CONFIG).read_text("utf-8"))["model_type"] == "mode":
        import mode.modular.model  # noqa: F401  (registers the class)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    save_tensors(found, {"logits": compute_logits(model, load_tensors(given)[0]["ids"])}, {})


if __name__ == "__main__":
    write_logits(*map(Path, sys.argv[1:]))
