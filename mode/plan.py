"""Predict a training step on many devices: every device a copy, weights in shards, or branches side by side.

Arithmetic on the closed forms of `mode.cost`, per step of G tokens on D devices of F operations and W bytes a second.
With P weights, of which T train, s = 2 bytes a weight sent (bf16) and 4 a gradient (fp32):

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings

from mode import config
from mode.checked import STRICT, ConfigError, nearest
from mode.cost import Flops, Layer, beside, blocks, gate_size, shape_of
from mode.method import Method
from mode.modular_method import MoDE
from mode.settings import Run

HALF, WHOLE = 2, 4
"""Bytes of a number in bf16 and in fp32."""
OVERLAP = 0.8
"""Share of the shorter of computing and traffic that hides behind the longer, where a link does not say."""
MICRO = (1, 2, 4, 8)
"""Micro-batches in flight that are tried."""
BUCKET = 25e6
"""Bytes of gradients that DDP reduces at a time."""


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


@dataclass(frozen=True)
class Branch:
    """Layers that run one after the other.

    Attributes:
        flops: Per token.
        weights: Their parameters.
        trained: Those that train.
        layers: Their number: each is gathered by itself.
        kept: Bytes of activations that a token leaves for the backward pass.
    """

    flops: Flops
    weights: int
    trained: int
    layers: int
    kept: float

    def __add__(self, other: Branch) -> Branch:
        """Put two branches on the same devices."""
        return Branch(
            self.flops + other.flops,
            self.weights + other.weights,
            self.trained + other.trained,
            self.layers + other.layers,
            self.kept + other.kept,
        )


IDLE = Branch(Flops(), 0, 0, 0, 0.0)


@dataclass(frozen=True)
class Work:
    """A training step: by block its branches, the backbone's first; and the head with the embeddings.

    Attributes:
        blocks: The branches of every block.
        head: What is outside the layers: head, embeddings, gates.
        hidden: Size of a hidden state, d.
        tokens: Tokens of a step, G.
        half: Bytes in which weights and hidden states are sent, s.
    """

    blocks: tuple[tuple[Branch, ...], ...]
    head: Branch
    hidden: int
    tokens: int
    half: int = HALF

    @property
    def whole(self) -> Branch:
        """Everything on one device."""
        return sum((branch for block in self.blocks for branch in block), start=self.head)


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


def read(kind: type[Any], group: str, name: str, extra: Path | None = None) -> Any:
    """Read a device or a link from its YAML.

    Raises:
        ConfigError: There is none of that name, or it does not say what it should.
    """
    known = config.list_members(group, extra)
    if name not in known:
        raise ConfigError(f"--{group} {name}: not one of {', '.join(known)}{nearest(name, known)}")
    try:
        return TypeAdapter(kind).validate_python(config.read_group(group, name, extra))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(f"{group}/{name}.yaml: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error


def work_of(run: Run) -> Work:
    """Return the step of a run's own stage.

    Raises:
        ConfigError: Its method does not say what it takes.
    """
    method, shape, length = run.method, shape_of(run.backbone), run.train.sequence_length
    tokens = run.train.batch_size * length
    outside = shape.parameters - sum(layer.parameters for layer in shape.layers)
    if isinstance(method, MoDE):
        found, count, (shared, chosen) = [], method.count(run), method.kept_shares(run)
        gates = beside(shape, count, method.num_blocks, method.expert_layers, 0, method.gate.hidden)[1]
        gate = 2.0 * gate_size(shape.hidden, count, method.gate.hidden)
        mixing = Flops(method.num_blocks * gate, (2 * method.num_blocks - 1) * gate)
        head = Branch(shape.head(trains=False) + mixing, outside + gates, gates, 1, 0.0)
        for number, (block, expert) in enumerate(blocks(shape, method.num_blocks, method.expert_layers)):
            trains, later = method.train_experts, number > 0
            backbone = stacked(block, length, shared, trains=False, upstream=later)
            found.append((backbone, *[stacked(expert, length, chosen, trains=trains, upstream=later)] * count))
        return Work(tuple(found), head, shape.hidden, tokens)
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None:
        raise ConfigError(
            f"method {type(method).__name__} does not say what it takes (`cost`), so it cannot be planned"
        )
    trains = cost.trainable == cost.total
    kept = sum(
        activations(layer, trains=trains, upstream=number > 0 or trains) for number, layer in enumerate(shape.layers)
    )
    head = Branch(Flops(), outside, trains * outside, 1, 0.0)  # its operations are among the layers'
    one = Branch(cost.flops, cost.total - outside, cost.trainable - head.trained, len(shape.layers), kept)
    return Work(((one,),), head, shape.hidden, tokens)


def stacked(layers: list[Layer], length: int, share: float, *, trains: bool, upstream: bool) -> Branch:
    """Return layers as a branch, on whose last a share of tokens run."""
    found = IDLE
    for number, layer in enumerate(layers, 1):
        kept = activations(layer, trains=trains, upstream=upstream)
        weights, some = layer.parameters, share if number == len(layers) else 1.0
        flops = layer.flops_of_some(length, some, trains=trains, upstream=upstream)
        found += Branch(flops, weights, trains * weights, 1, kept)
        upstream = upstream or trains
    return found


def activations(layer: Layer, *, trains: bool, upstream: bool) -> float:
    """Return the bytes that a token leaves in a layer for its backward pass, in bf16.

    Both norms keep their input, attention what it reads and says, the feed-forward part what its gate and its product
    read; the inputs of matrices are kept where these train.
    """
    if not (trains or upstream):
        return 0.0
    outputs = [sum(out for _, out in stage.values()) for stage in layer.stages]
    inputs = [max((read for read, _ in stage.values()), default=0) for stage in layer.stages]
    numbers = inputs[0] + outputs[0] + layer.width + inputs[2] + outputs[2]
    return float(HALF * (numbers + trains * (inputs[0] + inputs[2] + inputs[3])))


def held(branch: Branch, shards: int, tokens: float) -> float:
    """Return the bytes of a branch on one of the devices that share it.

    Weights, gradients and moments are in fp32 and in shards; activations are in bf16, and so are the weights that
    products of matrices read where there is one device: else those of a layer at a time.
    """
    read = HALF * branch.weights if shards == 1 else 0
    return (WHOLE * branch.weights + 3 * WHOLE * branch.trained) / shards + read + tokens * branch.kept


def ddp(work: Work, devices: int, device: Device, link: Link) -> Estimate:
    """Predict a step with a copy of the model on every device."""
    whole, share = work.whole, work.tokens / devices
    computing = sum(device.seconds(whole, share))
    traffic = 2.0 * WHOLE * whole.trained * (devices - 1) / devices
    messages = 2 * (devices - 1) * -(-WHOLE * whole.trained // BUCKET)
    seconds = link.hides(computing, traffic / link.bandwidth + messages * link.latency)
    return Estimate("ddp", seconds, computing, traffic, held(whole, 1, share))


def sharded(branch: Branch, devices: int, half: int, *, stays: bool = False) -> tuple[float, float]:
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


def all_sharded(head: Branch, branches: Sequence[Branch], devices: int, half: int) -> tuple[float, float]:
    """Return the same of several branches and of what is outside the layers, which stays."""
    each = [sharded(head, devices, half, stays=True), *(sharded(branch, devices, half) for branch in branches)]
    volumes, messages = zip(*each, strict=True)
    return sum(volumes), sum(messages)


def fsdp(work: Work, devices: int, device: Device, link: Link) -> Estimate:
    """Predict a step with the weights in shards over all devices."""
    whole, share = work.whole, work.tokens / devices
    computing = sum(device.seconds(whole, share))
    parts = [branch for block in work.blocks for branch in block]
    traffic, messages = all_sharded(work.head, parts, devices, work.half)
    seconds = link.hides(computing, link.shards(traffic, messages))
    return Estimate("fsdp", seconds, computing, traffic, held(whole, devices, share))


Slots = tuple[tuple[tuple[int, ...], int], ...]
"""Of every slot its branches, and its devices."""


def mpmd(work: Work, slots: Slots, micro: int, device: Device, link: Link) -> Estimate:
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
        volume, messages = all_sharded(work.head, mine, devices, work.half)
        traffic, behind = max(traffic, volume), max(behind, link.shards(volume, messages))
        memory = max(memory, held(sum(mine, start=work.head), devices, work.tokens / devices))
    seconds = link.hides(computing, behind) + waiting
    return Estimate("mpmd", seconds, computing, traffic + exchange, memory, written(slots), micro)


def written(slots: Slots) -> str:
    """Write a placement.

    >>> written((((0,), 4), ((1, 2), 2)))
    'backbone on 4, experts 1 and 2 on 2'
    """
    parts = []
    for chosen, devices in slots:
        names = " and ".join(str(index) for index in chosen if index)
        experts = f"expert{'s' if len(chosen) - (0 in chosen) > 1 else ''} {names}" if names else ""
        parts.append(f"{' and '.join(part for part in ('backbone' * (0 in chosen), experts) if part)} on {devices}")
    return ", ".join(parts)


def placements(work: Work, devices: int) -> Iterator[Slots]:
    """Return placements worth trying: the backbone alone on a part of the devices, experts even over the rest."""
    experts = len(work.blocks[0]) - 1
    for slots in range(1, min(experts, devices - 1) + 1):
        dealt = [tuple(range(1 + slot, experts + 1, slots)) for slot in range(slots)]
        for alone in {devices // (slots + 1), devices // 4, devices // 2, 3 * devices // 4}:
            each, rest = divmod(devices - alone, slots)
            if alone and each and not rest:
                yield (((0,), alone), *((chosen, each) for chosen in dealt))


def estimates(work: Work, devices: int, device: Device, link: Link) -> list[Estimate]:
    """Return a prediction of every layout, of branches side by side the fastest that fits, or the smallest.

    Args:
        work: The step.
        devices: D.
        device: What they are.
        link: What connects them.
    """
    plain: list[Callable[[Work, int, Device, Link], Estimate]] = [ddp, fsdp]
    found = [each(work, devices, device, link) for each in plain]
    tried = [mpmd(work, slots, micro, device, link) for slots in placements(work, devices) for micro in MICRO]
    if tried:
        fits = [one for one in tried if one.memory <= device.memory]
        found.append(min(fits, key=lambda one: one.seconds) if fits else min(tried, key=lambda one: one.memory))
    return found


def verdict(work: Work, found: list[Estimate], devices: int, device: Device) -> str:
    """Say which layout is best, why, and whether branches side by side could ever be."""
    fits = [one for one in found if one.memory <= device.memory]
    if not fits:
        return "no layout fits: more devices, train.accumulate, or train.activation_checkpointing"
    best = min(fits, key=lambda one: one.seconds)
    why = "computing" if best.computing > 0.9 * best.seconds else "traffic"
    text = f"best: {best.layout}, bound by {why}"
    others = [one for one in fits if one.layout != "mpmd"]
    if best.layout == "mpmd" or not others or len(found) < 3:
        return text
    free = [
        mpmd(work, slots, micro, device, Link(bandwidth=1e30, latency=0.0)).computing
        for slots in placements(work, devices)
        for micro in MICRO
    ]
    fastest = min(one.seconds for one in others)
    if min(free) >= fastest:
        return f"{text}; mpmd cannot win: its slots alone, with nothing to send, take {min(free) / fastest:.2f} of that"
    return f"{text}; mpmd could win over a faster link"


def with_tokens(work: Work, tokens: int) -> Work:
    """Return a step of another number of tokens."""
    return replace(work, tokens=tokens)
