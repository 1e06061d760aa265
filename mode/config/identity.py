"""What identifies a run: what was asked, and of which data and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from mode.config.names import record_names
from mode.config.registry import find_method
from mode.config.run import Run

RECIPE = 1
"""Part of every run's identity; raised with the golden losses, when the mathematics of the loop changes."""


NO_EFFECT = ("log_every", "checkpoint_every", "validate_every", "parallelism")
"""Settings of the loop that no weight depends on."""


NOT_IDENTITY = ("paths", "track", "domains")
"""Settings that do not change what a run is; domains enter its identity through the fingerprints of their data."""


def describe_run(run: Run) -> dict[str, Any]:
    """Return what identifies a run, as plain data: its configuration without paths, tracking and unused settings.

    A setting that equals the default of its class is left out, so that a setting added later, off by default, does
    not make older records unfindable. A setting without a default always counts, and so does one that had none when it
    was first recorded, which its class names in `always_recorded`. Names are those of records (`mode.config.names`).
    """
    plain = {item.name: as_plain(getattr(run, item.name)) for item in fields(run) if item.name not in NOT_IDENTITY}
    method = plain["method"]
    for name in run.method.unused():
        method.pop(name, None)
    for name in NO_EFFECT:
        plain["train"].pop(name, None)
    plain["budget"] = as_plain(run.method.effective(run))
    plain["method"] = {"_target_": run.method.recorded_name(), **method}
    return record_names(plain)


def as_plain(value: Any) -> Any:
    """Turn a settings object into plain data without the fields left at their class's default."""
    if is_dataclass(value) and not isinstance(value, type):
        always = getattr(value, "always_recorded", ())
        return {
            item.name: as_plain(getattr(value, item.name))
            for item in fields(value)
            if item.default is MISSING or item.name in always or getattr(value, item.name) != item.default
        }
    if isinstance(value, Mapping) and "_target_" in value:  # a method that the run stands on
        return {**value, "_target_": find_method(str(value["_target_"])).recorded_name()}
    return list(value) if isinstance(value, tuple) else value


def digest_run(plain: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    """Return the id of a run: a hash of what was asked and of the data and weights that it was asked of."""
    text = json.dumps([RECIPE, plain, dict(fingerprints)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
