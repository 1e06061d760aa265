"""Estimates of a step in each layout of several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mode.planning.machine import Device, Link
from mode.planning.work import HALF, IDLE, WHOLE, Branch, Work

BUCKET = 25e6
"""Bytes of gradients that DDP reduces at a time."""


@dataclass(frozen=True)
class Estimate:
    """What a step is predicted to take under one layout.

    Attributes:
        layout: Its name.
        seconds: Of a step.
        computing: Seconds of a step in which the slowest device computes or waits for another slot.
        traffic: Bytes that a device sends in a step.
        memory: Bytes that the fullest device holds.
        placement: Branches and devices of every slot.
        micro: Micro-batches in flight.
    """

    layout: str
    seconds: float
    computing: float
    traffic: float
    memory: float
    placement: str = ""
    micro: int = 1


def count_held(branch: Branch, shards: int, tokens: float) -> float:
    """Return the bytes of a branch on one of the devices that share it.

    Weights, gradients and moments are in fp32 and in shards; activations are in bf16, and so are the weights that
    products of matrices read where there is one device: else those of a layer at a time.
    """
    read = HALF * branch.weights if shards == 1 else 0
    return (WHOLE * branch.weights + 3 * WHOLE * branch.trained) / shards + read + tokens * branch.kept


def estimate_ddp(work: Work, devices: int, device: Device, link: Link) -> Estimate:
    """Predict a step with a copy of the model on every device."""
    whole, share = work.whole, work.tokens / devices
    computing = sum(device.seconds(whole, share))
    traffic = 2.0 * WHOLE * whole.trained * (devices - 1) / devices
    messages = 2 * (devices - 1) * -(-WHOLE * whole.trained // BUCKET)
    seconds = link.hides(computing, traffic / link.bandwidth + messages * link.latency)
    return Estimate("ddp", seconds, computing, traffic, count_held(whole, 1, share))


def count_sharded(branch: Branch, devices: int, half: int, *, stays: bool = False) -> tuple[float, float]:
    """Return the bytes and the messages of a branch's weights in shards over some devices.

    Args:
        branch: The branch.
        devices: Their number.
        half: Bytes in which weights are sent.
        stays: Whether it stays whole from the forward to the backward pass.
    """
    back = branch.weights if branch.flops.backward and not stays else 0
    volume = (half * (branch.weights + back) + WHOLE * branch.trained) * (devices - 1) / devices
    rounds = branch.layers * (1 + bool(back) + bool(branch.trained))
    return volume, float(rounds * (devices - 1))


def count_all_sharded(head: Branch, branches: Sequence[Branch], devices: int, half: int) -> tuple[float, float]:
    """Return the same of several branches and of what is outside the layers, which stays."""
    each = [
        count_sharded(head, devices, half, stays=True),
        *(count_sharded(branch, devices, half) for branch in branches),
    ]
    volumes, messages = zip(*each, strict=True)
    return sum(volumes), sum(messages)


def estimate_fsdp(work: Work, devices: int, device: Device, link: Link) -> Estimate:
    """Predict a step with the weights in shards over all devices."""
    whole, share = work.whole, work.tokens / devices
    computing = sum(device.seconds(whole, share))
    parts = [branch for block in work.blocks for branch in block]
    traffic, messages = count_all_sharded(work.head, parts, devices, work.half)
    seconds = link.hides(computing, link.shards(traffic, messages))
    return Estimate("fsdp", seconds, computing, traffic, count_held(whole, devices, share))


Slots = tuple[tuple[tuple[int, ...], int], ...]
"""Of every slot its branches, and its devices."""


def estimate_mpmd(work: Work, slots: Slots, micro: int, device: Device, link: Link) -> Estimate:
    """Predict a step with the branches of every block spread over slots of devices."""
    count, all_devices = len(slots), sum(devices for _, devices in slots)
    ahead = [0.0, 0.0]
    alone: list[list[float]] = [[0.0, 0.0] for _ in slots]
    for block in work.blocks:
        each = [sum((block[index] for index in chosen), start=IDLE) for chosen, _ in slots]
        spent = [
            device.seconds(one, work.tokens / devices, micro) for one, (_, devices) in zip(each, slots, strict=True)
        ]
        for way in range(2):
            ahead[way] += max(both[way] for both in spent)
            for slot, both in enumerate(spent):
                alone[slot][way] += both[way]
    bound = max(map(sum, alone))
    computing = bound + (sum(ahead) - bound) / micro + sum(device.seconds(work.head, work.tokens / all_devices))
    fewest = min(devices for _, devices in slots)
    times_sent = 2 * (len(work.blocks) - 1) + 1
    exchange = times_sent * 2 * (count - 1) / count * work.half * work.hidden * work.tokens / fewest
    waiting = (exchange / link.bandwidth + times_sent * micro * 2 * (count - 1) * link.latency) / micro
    traffic, behind, memory = 0.0, 0.0, 0.0
    for chosen, devices in slots:
        mine = [block[index] for block in work.blocks for index in chosen]
        volume, messages = count_all_sharded(work.head, mine, devices, work.half)
        traffic, behind = max(traffic, volume), max(behind, link.shards(volume, messages))
        memory = max(memory, count_held(sum(mine, start=work.head), devices, work.tokens / devices))
    seconds = link.hides(computing, behind) + waiting
    return Estimate("mpmd", seconds, computing, traffic + exchange, memory, format_placement(slots), micro)


def format_placement(slots: Slots) -> str:
    """Write a placement.

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
    """Return placements worth trying: the backbone alone on a part of the devices, experts even over the rest."""
    experts = len(work.blocks[0]) - 1
    for slots in range(1, min(experts, devices - 1) + 1):
        dealt = [tuple(range(1 + slot, experts + 1, slots)) for slot in range(slots)]
        for alone in {devices // (slots + 1), devices // 4, devices // 2, 3 * devices // 4}:
            each, rest = divmod(devices - alone, slots)
            if alone and each and not rest:
                yield (((0,), alone), *((chosen, each) for chosen in dealt))
