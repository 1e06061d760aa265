"""Estimates of a training step under each layout of several processes: DDP, FSDP and MPMD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mode.planning.machine import Device, Link
from mode.planning.work import HALF, IDLE, WHOLE, Branch, Work

BUCKET = 25e6
"""Bytes of gradients in one all-reduce of DDP."""


@dataclass(frozen=True)
class Estimate:
    """Predicted time, traffic and memory of a step under one layout.

    Attributes:
        layout: Name of the layout: `ddp`, `fsdp` or `mpmd`.
        seconds: Seconds of a step.
        computing: Seconds of a step in which the slowest device computes or waits for another slot.
        traffic: Bytes that one device sends in a step.
        memory: Bytes on the device that holds the most.
        placement: Branches and devices of every slot, as text.
        micro: Number of micro-batches in flight.
    """

    layout: str
    seconds: float
    computing: float
    traffic: float
    memory: float
    placement: str = ""
    micro: int = 1


def count_memory(branch: Branch, shards: int, tokens: float) -> float:
    """Return the bytes that a branch takes on one of the devices that share it.

    Parameters, gradients and optimizer state are sharded and in fp32. Activations are in bf16. Without sharding, a bf16
    copy of the weights for matrix products is counted too. With sharding, that copy exists for one layer at a time and
    is left out.
    """
    copies = HALF * branch.weights if shards == 1 else 0
    return (WHOLE * branch.weights + 3 * WHOLE * branch.trained) / shards + copies + tokens * branch.kept


def estimate_ddp(work: Work, devices: int, device: Device, link: Link) -> Estimate:
    """Estimate a step of DDP: every device has a copy of the model."""
    whole, share = work.whole, work.tokens / devices
    computing = sum(device.estimate_seconds(whole, share))
    traffic = 2.0 * WHOLE * whole.trained * (devices - 1) / devices
    messages = 2 * (devices - 1) * -(-WHOLE * whole.trained // BUCKET)
    seconds = link.overlap_seconds(computing, traffic / link.bandwidth + messages * link.latency)
    return Estimate("ddp", seconds, computing, traffic, count_memory(whole, 1, share))


def count_sharded_traffic(branch: Branch, devices: int, half: int, *, stays: bool = False) -> tuple[float, float]:
    """Return the bytes that a device sends for a sharded branch in a step, and the number of messages.

    Args:
        branch: The branch.
        devices: Number of devices that share the branch.
        half: Bytes of one weight on the link.
        stays: Whether gathered weights are kept from the forward to the backward pass.
    """
    regathered = branch.weights if branch.flops.backward and not stays else 0
    volume = (half * (branch.weights + regathered) + WHOLE * branch.trained) * (devices - 1) / devices
    rounds = branch.layers * (1 + bool(regathered) + bool(branch.trained))
    return volume, float(rounds * (devices - 1))


def sum_sharded_traffic(head: Branch, branches: Sequence[Branch], devices: int, half: int) -> tuple[float, float]:
    """Return bytes and messages of several sharded branches and of the head, whose weights stay gathered."""
    counts = [
        count_sharded_traffic(head, devices, half, stays=True),
        *(count_sharded_traffic(branch, devices, half) for branch in branches),
    ]
    volumes, messages = zip(*counts, strict=True)
    return sum(volumes), sum(messages)


def estimate_fsdp(work: Work, devices: int, device: Device, link: Link) -> Estimate:
    """Estimate a step of FSDP: parameters, gradients and optimizer state are sharded over all devices."""
    whole, share = work.whole, work.tokens / devices
    computing = sum(device.estimate_seconds(whole, share))
    parts = [branch for block in work.blocks for branch in block]
    traffic, messages = sum_sharded_traffic(work.head, parts, devices, work.half)
    seconds = link.overlap_seconds(computing, link.estimate_sharded_seconds(traffic, messages))
    return Estimate("fsdp", seconds, computing, traffic, count_memory(whole, devices, share))


Slots = tuple[tuple[tuple[int, ...], int], ...]
"""One pair for each slot: the numbers of its branches, and its number of devices. Branch 0 is the backbone."""


def estimate_mpmd(work: Work, slots: Slots, micro: int, device: Device, link: Link) -> Estimate:
    """Estimate a step of MPMD: the branches of every block are spread over slots of devices."""
    count, all_devices = len(slots), sum(devices for _, devices in slots)
    synchronized = [0.0, 0.0]  # forward and backward seconds if every block waits for its slowest slot
    alone: list[list[float]] = [[0.0, 0.0] for _ in slots]
    for block in work.blocks:
        parts = [sum((block[index] for index in chosen), start=IDLE) for chosen, _ in slots]
        times = [
            device.estimate_seconds(part, work.tokens / devices, micro)
            for part, (_, devices) in zip(parts, slots, strict=True)
        ]
        for direction in range(2):
            synchronized[direction] += max(both[direction] for both in times)
            for slot, both in enumerate(times):
                alone[slot][direction] += both[direction]
    bound = max(map(sum, alone))
    head = sum(device.estimate_seconds(work.head, work.tokens / all_devices))
    computing = bound + (sum(synchronized) - bound) / micro + head
    fewest = min(devices for _, devices in slots)
    times_sent = 2 * (len(work.blocks) - 1) + 1
    exchange = times_sent * 2 * (count - 1) / count * work.half * work.hidden * work.tokens / fewest
    waiting = (exchange / link.bandwidth + times_sent * micro * 2 * (count - 1) * link.latency) / micro
    traffic, hidden, memory = 0.0, 0.0, 0.0
    for chosen, devices in slots:
        mine = [block[index] for block in work.blocks for index in chosen]
        volume, messages = sum_sharded_traffic(work.head, mine, devices, work.half)
        traffic, hidden = max(traffic, volume), max(hidden, link.estimate_sharded_seconds(volume, messages))
        memory = max(memory, count_memory(sum(mine, start=work.head), devices, work.tokens / devices))
    seconds = link.overlap_seconds(computing, hidden) + waiting
    return Estimate("mpmd", seconds, computing, traffic + exchange, memory, format_placement(slots), micro)


def format_placement(slots: Slots) -> str:
    """Render a placement as text.

    >>> format_placement((((0,), 4), ((1, 2), 2)))
    'backbone on 4, experts 1 and 2 on 2'
    """
    parts = []
    for chosen, devices in slots:
        names = " and ".join(str(index) for index in chosen if index)
        experts = f"expert{'s' if len(chosen) - (0 in chosen) > 1 else ''} {names}" if names else ""
        parts.append(f"{' and '.join(part for part in ('backbone' * (0 in chosen), experts) if part)} on {devices}")
    return ", ".join(parts)


def list_placements(work: Work, devices: int) -> Iterator[Slots]:
    """Yield candidate placements: the backbone on some devices, and the experts spread evenly over the others."""
    experts = len(work.blocks[0]) - 1
    for slots in range(1, min(experts, devices - 1) + 1):
        dealt = [tuple(range(1 + slot, experts + 1, slots)) for slot in range(slots)]
        for alone in {devices // (slots + 1), devices // 4, devices // 2, 3 * devices // 4}:
            share, rest = divmod(devices - alone, slots)
            if alone and share and not rest:
                yield (((0,), alone), *((chosen, share) for chosen in dealt))
