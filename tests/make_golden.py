"""Write tests/golden.json anew: python -m tests.make_golden. Only after a change of mathematics, in its own commit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from mode import config
from mode.record import processor
from mode.runner import execute
from tests.conftest import make_world
from tests.test_train import GOLDEN, GOLDEN_SETTINGS, LOSSES


def main() -> None:
    """Train every golden run in a temporary world and keep its losses in full."""
    golden: dict[str, list[str]] = {"sky": [processor(), torch.__version__]}
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for name, overrides in LOSSES.items():
            record = execute(config.compose([*world.overrides, *overrides, *GOLDEN_SETTINGS], world.conf))
            golden[name] = [point["loss"].hex() for point in record.happened["curve"]]
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
