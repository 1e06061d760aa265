"""The identity of a run: its configuration, and the fingerprints of its data and weights."""

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
"""Version of the loop's mathematics, part of every run's identity. It is raised together with the golden losses."""


NO_EFFECT = ("log_every", "checkpoint_every", "validate_every", "parallelism")
"""Settings of the loop that do not affect the trained weights."""


NOT_IDENTITY = ("paths", "track", "domains")
"""Settings that are not part of a run's identity. Domains are part of it by the fingerprints of their data."""


def describe_run(run: Run) -> dict[str, Any]:
    """Return the configuration that identifies a run, as plain data without paths, tracking and unused settings.

    Settings that equal the default of their class are left out. So older records stay valid when a later version adds a
    setting that is off by default. Settings without a default are always included. So are settings that had no default
    when they were first recorded; their class lists them in `always_recorded`. Names are those of records
    (`mode.config.names`).
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
    """Return a settings object as plain data, without fields that equal the default of their class."""
    if is_dataclass(value) and not isinstance(value, type):
        always = getattr(value, "always_recorded", ())
        return {
            item.name: as_plain(getattr(value, item.name))
            for item in fields(value)
            if item.default is MISSING or item.name in always or getattr(value, item.name) != item.default
        }
    if isinstance(value, Mapping) and "_target_" in value:  # the method of an earlier stage
        return {**value, "_target_": find_method(str(value["_target_"])).recorded_name()}
    return list(value) if isinstance(value, tuple) else value


def digest_run(plain: Mapping[str, Any], fingerprints: Mapping[str, str]) -> str:
    """Return the id of a run: a hash of its configuration and of the fingerprints of its data and weights.

    Args:
        plain: What `describe_run` returns.
        fingerprints: Fingerprints of data and weights, by name.
    """
    text = json.dumps([RECIPE, plain, dict(fingerprints)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
