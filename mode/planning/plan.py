"""Prediction of a training step on many devices: DDP, FSDP, or branches on devices of their own (MPMD).

The prediction follows from the closed forms of `mode.cost.flops`. A step has G tokens and runs on D devices. A device
does F operations and sends W bytes per second. The model has P parameters, of which T train. A weight takes s = 2 bytes
on the link (bf16), and a gradient takes 4 bytes (fp32). Traffic of a device in a step:

    ddp     Every device holds the whole model. Gradients are all-reduced.
                                                     2 * 4 T (D - 1) / D bytes
    fsdp    Weights are sharded. They are gathered for the forward pass, and again for the backward pass of layers that
            gradients flow through. Weights outside the layers stay gathered in between. Gradients are reduce-scattered.
                                                     (s (P + P_backward) + 4 T) (D - 1) / D bytes
    mpmd    K slots of devices hold some branches each, sharded within the slot. In both passes a block ends when its
            slowest slot ends. The output of a block, d elements per token, is then summed over slots. A step with B
            blocks has 2 (B - 1) + 1 such sums.
                                                     2 (K - 1) / K s d tokens bytes each

Most traffic overlaps with computing (`Link.overlap`). The sums over slots overlap only if several micro-batches are in
flight. With m micro-batches, 1 / m of these sums and of the waiting for slower slots remains.
"""

from __future__ import annotations

from collections.abc import Callable

from mode.planning.layouts import Estimate, estimate_ddp, estimate_fsdp, estimate_mpmd, list_placements
from mode.planning.machine import Device, Link
from mode.planning.work import Work

MICRO = (1, 2, 4, 8)
"""Numbers of micro-batches in flight to try."""


def estimate_layouts(work: Work, devices: int, device: Device, link: Link) -> list[Estimate]:
    """Return an estimate for every layout.

    Of the placements of `mpmd` only one is returned: the fastest that fits in memory, or else the smallest. Without a
    candidate placement, `mpmd` is left out.

    Args:
        work: The step.
        devices: Number of devices, D.
        device: Kind of device.
        link: Link between the devices.
    """
    estimators: list[Callable[[Work, int, Device, Link], Estimate]] = [estimate_ddp, estimate_fsdp]
    estimates = [estimate(work, devices, device, link) for estimate in estimators]
    placed = [
        estimate_mpmd(work, slots, micro, device, link) for slots in list_placements(work, devices) for micro in MICRO
    ]
    if placed:
        fits = [one for one in placed if one.memory <= device.memory]
        estimates.append(min(fits, key=lambda one: one.seconds) if fits else min(placed, key=lambda one: one.memory))
    return estimates


def summarise_estimates(work: Work, estimates: list[Estimate], devices: int, device: Device) -> str:
    """Summarise in one line which layout is fastest, what bounds it, and whether `mpmd` could be faster."""
    fits = [one for one in estimates if one.memory <= device.memory]
    if not fits:
        more = "train.batch.gradient_accumulation_steps, or train.memory.activation_checkpointing"
        return f"no layout fits: more devices, {more}"
    best = min(fits, key=lambda one: one.seconds)
    why = "computing" if best.computing > 0.9 * best.seconds else "traffic"
    text = f"best: {best.layout}, bound by {why}"
    others = [one for one in fits if one.layout != "mpmd"]
    if best.layout == "mpmd" or not others or len(estimates) < 3:
        return text
    free = [
        estimate_mpmd(work, slots, micro, device, Link(bandwidth=1e30, latency=0.0)).computing
        for slots in list_placements(work, devices)
        for micro in MICRO
    ]
    fastest = min(one.seconds for one in others)
    if min(free) >= fastest:
        return f"{text}; mpmd cannot win: even with free traffic it takes {min(free) / fastest:.2f} of that time"
    return f"{text}; mpmd could win over a faster link"
