"""Write tests/train/golden.json anew: python -m tests.train.make_golden.

Only after a change of mathematics, in a commit of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from mode.config.compose import compose
from mode.records.provenance import read_processor_name
from mode.runs.execute import execute
from tests.conftest import make_world
from tests.train.test_loop import GOLDEN, GOLDEN_SETTINGS, LOSSES


def main() -> None:
    """Train every golden run in a temporary world and keep its losses in full."""
    golden: dict[str, list[str]] = {"conditions": [read_processor_name(), torch.__version__]}
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for name, overrides in LOSSES.items():
            record = execute(compose([*world.overrides, *overrides, *GOLDEN_SETTINGS], world.conf))
            golden[name] = [point["loss"].hex() for point in record.happened["curve"]]
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
