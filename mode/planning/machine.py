"""Devices and links, by their data sheets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings

from mode.config.base import STRICT
from mode.config.groups import list_members, read_group
from mode.core.errors import ConfigError, suggest
from mode.planning.work import Branch

OVERLAP = 0.8
"""Share of the shorter of computing and traffic that hides behind the longer, where a link does not say."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Device:
    """A device.

    Attributes:
        flops: Operations a second that dense training reaches.
        memory: Bytes.
        layer: Seconds that a layer takes in a step however few its tokens are: starting its operations, and its update.
    """

    flops: Annotated[float, Field(gt=0.0)]
    memory: Annotated[float, Field(gt=0.0)]
    layer: Annotated[float, Field(ge=0.0)] = 0.0

    def seconds(self, branch: Branch, tokens: float, micro: int = 1) -> tuple[float, float]:
        """Return what the forward and the backward pass of so many tokens, in micro-batches, take here."""
        fixed = micro * branch.layers * self.layer / 2
        return tokens * branch.flops.forward / self.flops + fixed, tokens * branch.flops.backward / self.flops + fixed


@settings(frozen=True, kw_only=True, config=STRICT)
class Link:
    """What connects devices.

    Attributes:
        bandwidth: Bytes a second, of each device and direction.
        gathering: The same of weights that are gathered and gradients that are scattered; null where it is the same.
        latency: Seconds of a message.
        overlap: Share of the shorter of computing and traffic that hides behind the longer.
    """

    bandwidth: Annotated[float, Field(gt=0.0)]
    gathering: Annotated[float, Field(gt=0.0)] | None = None
    latency: Annotated[float, Field(ge=0.0)]
    overlap: Annotated[float, Field(ge=0.0, le=1.0)] = OVERLAP

    def shards(self, volume: float, messages: float) -> float:
        """Return the seconds that so many bytes of weights in shards take, in so many messages."""
        return volume / (self.gathering or self.bandwidth) + messages * self.latency

    def hides(self, computing: float, sending: float) -> float:
        """Return the seconds of computing and sending, of which the shorter hides behind the longer in part."""
        return max(computing, sending) + (1 - self.overlap) * min(computing, sending)


def read_machine(kind: type[Any], group: str, name: str, extra: Path | None = None) -> Any:
    """Read a device or a link from its YAML.

    Raises:
        ConfigError: There is none of that name, or it does not say what it should.
    """
    known = list_members(group, extra)
    if name not in known:
        raise ConfigError(f"--{group} {name}: not one of {', '.join(known)}{suggest(name, known)}")
    try:
        return TypeAdapter(kind).validate_python(read_group(group, name, extra))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(f"{group}/{name}.yaml: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
