"""Predict a training step on many devices: every device a copy, weights in shards, or branches side by side.

Arithmetic on the closed forms of `mode.cost.flops`, per step of G tokens on D devices of F operations and W bytes a
second. With P weights, of which T train, s = 2 bytes a weight sent (bf16) and 4 a gradient (fp32):

    ddp     every device holds all; gradients are all-reduced                  2 * 4 T (D - 1) / D bytes
    fsdp    weights in shards, gathered forward, and backward where gradients pass, but for what is outside the layers,
            which stays whole in between; gradients reduce-scattered
                                                     (s (P + P_backward) + 4 T) (D - 1) / D bytes
    mpmd    K slots of devices, each with some branches, sharded within. A block ends when its slowest slot does, in
            both passes; then its output, d numbers a token, is summed over slots: 2 (B - 1) + 1 times in a step,
                                                     2 (K - 1) / K s d tokens bytes each

Most traffic hides behind computing (`Link.overlap`). An exchange between slots cannot, unless several micro-batches are
in flight: with m of them 1 / m of the exchange and of the waiting for slower slots is left.
"""

from __future__ import annotations

from collections.abc import Callable

from mode.planning.layouts import Estimate, estimate_ddp, estimate_fsdp, estimate_mpmd, list_placements
from mode.planning.machine import Device, Link
from mode.planning.work import Work

MICRO = (1, 2, 4, 8)
"""Micro-batches in flight that are tried."""


def estimate_layouts(work: Work, devices: int, device: Device, link: Link) -> list[Estimate]:
    """Return a prediction of every layout, of branches side by side the fastest that fits, or the smallest.

    Args:
        work: The step.
        devices: D.
        device: What they are.
        link: What connects them.
    """
    plain: list[Callable[[Work, int, Device, Link], Estimate]] = [estimate_ddp, estimate_fsdp]
    found = [each(work, devices, device, link) for each in plain]
    tried = [
        estimate_mpmd(work, slots, micro, device, link) for slots in list_placements(work, devices) for micro in MICRO
    ]
    if tried:
        fits = [one for one in tried if one.memory <= device.memory]
        found.append(min(fits, key=lambda one: one.seconds) if fits else min(tried, key=lambda one: one.memory))
    return found


def summarise_estimates(work: Work, found: list[Estimate], devices: int, device: Device) -> str:
    """Say which layout is best, why, and whether branches side by side could ever be."""
    fits = [one for one in found if one.memory <= device.memory]
    if not fits:
        more = "train.batch.gradient_accumulation_steps, or train.memory.activation_checkpointing"
        return f"no layout fits: more devices, {more}"
    best = min(fits, key=lambda one: one.seconds)
    why = "computing" if best.computing > 0.9 * best.seconds else "traffic"
    text = f"best: {best.layout}, bound by {why}"
    others = [one for one in fits if one.layout != "mpmd"]
    if best.layout == "mpmd" or not others or len(found) < 3:
        return text
    free = [
        estimate_mpmd(work, slots, micro, device, Link(bandwidth=1e30, latency=0.0)).computing
        for slots in list_placements(work, devices)
        for micro in MICRO
    ]
    fastest = min(one.seconds for one in others)
    if min(free) >= fastest:
        return f"{text}; mpmd cannot win: its slots alone, with nothing to send, take {min(free) / fastest:.2f} of that"
    return f"{text}; mpmd could win over a faster link"
