"""Devices and links: speed, memory, bandwidth and latency, from data sheets or measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.config.base import STRICT
from mode.config.check import validate_member
from mode.config.groups import list_members
from mode.core.errors import ConfigError, suggest
from mode.planning.work import Branch

OVERLAP = 0.8
"""Default of `Link.overlap`."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Device:
    """A device that trains.

    Attributes:
        flops: Floating-point operations per second that dense training reaches.
        memory: Memory in bytes.
        layer: Fixed seconds of a layer in a step, independent of the tokens: kernel launches and the optimizer update.
    """

    flops: Annotated[float, Field(gt=0.0)]
    memory: Annotated[float, Field(gt=0.0)]
    layer: Annotated[float, Field(ge=0.0)] = 0.0

    def estimate_seconds(self, branch: Branch, tokens: float, micro: int = 1) -> tuple[float, float]:
        """Return the seconds of the forward and of the backward pass.

        Args:
            branch: The layers to run.
            tokens: Number of tokens of the step on this device.
            micro: Number of micro-batches that the tokens are split into.
        """
        fixed = micro * branch.layers * self.layer / 2
        return tokens * branch.flops.forward / self.flops + fixed, tokens * branch.flops.backward / self.flops + fixed


@settings(frozen=True, kw_only=True, config=STRICT)
class Link:
    """A link between devices.

    Attributes:
        bandwidth: Bytes per second of each device in each direction.
        gathering: Bandwidth of all-gather and reduce-scatter; null if it equals `bandwidth`.
        latency: Seconds of one message.
        overlap: How much of the shorter of computing and traffic overlaps with the longer, as a share from 0 to 1.
    """

    bandwidth: Annotated[float, Field(gt=0.0)]
    gathering: Annotated[float, Field(gt=0.0)] | None = None
    latency: Annotated[float, Field(ge=0.0)]
    overlap: Annotated[float, Field(ge=0.0, le=1.0)] = OVERLAP

    def estimate_sharded_seconds(self, volume: float, messages: float) -> float:
        """Return the seconds to gather and scatter sharded tensors: `volume` in bytes, and the number of messages."""
        return volume / (self.gathering or self.bandwidth) + messages * self.latency

    def overlap_seconds(self, computing: float, sending: float) -> float:
        """Return the seconds of computing and sending together, given the overlap of both."""
        return max(computing, sending) + (1 - self.overlap) * min(computing, sending)


def read_machine(kind: type[Any], group: str, name: str, extra: Path | None = None) -> Any:
    """Read a device or a link from its YAML file.

    Args:
        kind: `Device` or `Link`.
        group: Configuration group: `device` or `link`.
        name: Name of the YAML file, without suffix.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: The group has no such member, or a setting of it is not valid.
    """
    known = list_members(group, extra)
    if name not in known:
        raise ConfigError(f"--{group} {name}: not one of {', '.join(known)}{suggest(name, known)}")
    return validate_member(kind, group, name, extra)
