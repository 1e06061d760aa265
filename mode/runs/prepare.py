"""A prepared run: its data are packed and its identity is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mode.config import identity
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS, expand_home
from mode.data.pack import Packed, prepare_domain
from mode.methods.base import Method
from mode.records.record import Record, find_record


@dataclass(frozen=True)
class Prepared:
    """A run with its packed data and its identity.

    Attributes:
        run: Configuration.
        method: The run's method.
        packed: Prepared domains.
        backbone: Fingerprint of the weights that the run starts from.
        asked: What identifies the run, except data and weights.
        id: Identity of the run.
    """

    run: Run
    method: Method
    packed: Mapping[str, Packed]
    backbone: str
    asked: dict[str, Any]
    id: str

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of every domain's data."""
        return {name: packed.fingerprint for name, packed in self.packed.items()}

    @property
    def folder(self) -> Path:
        """Work folder, with checkpoint, curve and weights."""
        return expand_home(self.run.paths.runs) / self.id

    @property
    def results(self) -> Path:
        """Folder of records and tables."""
        return expand_home(self.run.paths.results)


_prepared: dict[str, Packed] = {}
"""Domains prepared by this process, so that planning many runs reads each domain's sources once."""


def prepare_run(run: Run) -> Prepared:
    """Prepare a run's data (from the cache after the first time) and compute its identity, without torch.

    Raises:
        ConfigError: The method builds no model, or the data or an artefact is wrong.
    """
    method = run.method
    if not isinstance(method, Method):
        raise ConfigError(f"method._target_={type(method).__qualname__}: does not say how to build a model")
    tokenizer = method.tokenizer(run)
    cache = expand_home(run.paths.cache)
    packed = {}
    for name in run.scored:
        domain = run.domains[name]
        key = f"{name} {domain} {tokenizer.fingerprint} {cache}"
        packed[name] = _prepared[key] = _prepared.get(key) or prepare_domain(name, domain, tokenizer, cache)
    asked = identity.describe_run(run)
    asked["backbone"] = {"name": run.backbone.name}
    if artefacts := method.artefacts(run):
        asked["artefacts"] = artefacts
    backbone = method.backbone_fingerprint(run)
    fingerprints = {name: data.fingerprint for name, data in packed.items()} | {"backbone": backbone}
    return Prepared(run, method, packed, backbone, asked, identity.digest_run(asked, fingerprints))


def find_finished(prepared: Prepared) -> Record | None:
    """Return the record of a finished run, else None. Its weights may be on another machine."""
    return find_record(prepared.results, prepared.id)


def require_finished(prepared: Prepared) -> Record:
    """Return the record of a finished run.

    Raises:
        ConfigError: The run is not finished.
    """
    record = find_finished(prepared)
    if record is None:
        raise ConfigError(f"run {prepared.id} is not finished: no record in {prepared.results / 'records'}")
    return record


def has_weights(prepared: Prepared) -> bool:
    """Say whether the trained weights of a run are on this machine."""
    return (prepared.folder / WEIGHTS).exists()
