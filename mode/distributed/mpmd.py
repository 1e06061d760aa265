"""Branches of a MoDE model side by side on different processes: the paper's MPMD layout, on DTensor placements.

K slots of D / K processes each. A process runs the branches of its slot alone; every process has the gates and the
head. Before a block its input is the same in all slots, and its gradient is summed over them; after it the slots'
outputs are summed (equation 2). The last block's sum leaves each slot a part of the rows, so that head and loss are
shared. A branch's weights, gradients and moments exist in its slot alone, but for the weights while the model is
scored, when all have all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils._pytree import tree_map

from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.processes import world_size
from mode.core.tensors import trainable_parameters
from mode.distributed import mpmd
from mode.modular.block import Block, find_blocks
from mode.modular.branches import Call

if TYPE_CHECKING:
    from torch import nn


class MPMD:
    """A modular model whose branches are spread over the slots of all processes.

    Attributes:
        slots: K.
        slot: This process's slot.
        owners: The slot of every branch, by its number; 0 is the backbone's.
        mine: The branches that this process runs.
        halves: Whether frozen matrices can be held in bf16 in a step.
        model: What trains.
    """

    halves = True

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        in_flight: int = 1,
        placement: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Place the branches.

        Args:
            model: A modular model.
            device: This process's.
            in_flight: Micro-batches in which rows pass through the blocks.
            placement: The branches of every slot; by default as even as can be.

        Raises:
            ConfigError: There are no branches to spread, too few processes, or gates that read what only one slot has;
                or the placement is not one of this model's branches.
        """
        self.model, self.in_flight = model, in_flight
        self.blocks = [block for block in find_blocks(model) if isinstance(block, Block)]
        self.check()
        placement = self.even() if placement is None else placement
        mpmd.check_placement(placement, 1 + len(self.blocks[0].experts))
        self.slots = len(placement)
        processes.ensure_initialized()
        names = ("branch", "data")
        shape = (self.slots, processes.world_size() // self.slots)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.branch, self.data = (mesh[name] for name in names)
        self.slot = self.branch.get_local_rank()
        slots = {index: slot for slot, chosen in enumerate(placement) for index in chosen}
        self.owners = [slots[index] for index in range(len(slots))]
        self.mine = [index for index, owner in enumerate(self.owners) if owner == self.slot]
        self.shapes = {parameter: parameter.shape for _, parameter in self.branch_weights()}

    def check(self) -> None:
        """Refuse what cannot be spread."""
        if not self.blocks:
            raise ConfigError("layout mpmd: MoDE alone has branches to spread")
        if len(self.blocks) < len(find_blocks(self.model)) or self.blocks[0].gate.settings.reads == "output":
            raise ConfigError("layout mpmd goes with method.head_rank=0 and method.gate.reads=input")

    def even(self) -> list[list[int]]:
        """Return as many slots as the processes allow, of as even work as can be: the longest branch first.

        Raises:
            ConfigError: The number of processes is no multiple of any number of slots.
        """
        branches = [self.blocks[0].backbone, *self.blocks[0].experts]
        counts = [count for count in range(2, len(branches) + 1) if processes.world_size() % count == 0]
        if not counts:
            raise ConfigError(
                f"layout mpmd: {processes.world_size()} processes are no multiple of 2 to {len(branches)} slots"
            )
        # A weight is read once forward and, for what comes before it and for itself if it trains, once each backward.
        work = [sum(2 + each.requires_grad for each in branch.parameters()) for branch in branches]
        chosen: list[list[int]] = [[] for _ in range(max(counts))]
        for index in sorted(range(len(branches)), key=lambda index: -work[index]):
            min(chosen, key=lambda slot: sum(work[each] for each in slot)).append(index)
        return sorted(sorted(slot) for slot in chosen)

    def branch_weights(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Return every branch's weights with the number of the branch, block by block."""
        for block in self.blocks:
            for index, layers in enumerate([block.backbone, *block.experts]):
                for parameter in layers.parameters():
                    yield index, parameter

    def forget(self) -> None:
        """Let go of the weights of other slots' branches."""
        for index, parameter in self.branch_weights():
            if index not in self.mine and parameter.numel():
                parameter.data = torch.empty(0, device=parameter.device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let the blocks run their slot's branches alone for a while, and forget the others'."""
        self.forget()
        for number, block in enumerate(self.blocks):
            last = number == len(self.blocks) - 1
            block.spread = BlockExchange(self.branch, self.mine, self.in_flight, splits=last)
        try:
            yield
        finally:
            for block in self.blocks:
                block.spread = None

    def part_for_good(self) -> None:
        """Forget the other slots' branches, and let blocks run their own from now on, for text token by token.

        What an expert knows stays in its slot: it sends hidden states alone.
        """
        self.forget()
        for block in self.blocks:
            block.spread = BlockExchange(self.branch, self.mine, splits=False)

    def rows(self, values: Any) -> Any:
        """Return the rows of a step that this process reads: all of its slot's."""
        part = len(values) // self.data.size()
        return values[self.data.get_local_rank() * part :][:part]

    def part(self, rows: Tensor) -> Tensor:
        """Return the rows that are left to this slot after the last block: its part of every micro-batch in flight."""
        return torch.cat([some.chunk(self.slots)[self.slot] for some in rows.chunk(self.in_flight)])

    def seed(self, seed: int) -> int:
        """Return a seed that is the same in all slots."""
        return processes.derive_seed(seed, self.data.get_local_rank())

    def wrap(self, objective: Any, make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Forget the other slots' branches, and return what a step runs, and its optimizer."""
        optimizer = make(self.model)
        self.forget()
        return objective, optimizer

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what trains in this slot, by name."""
        others = {id(parameter) for index, parameter in self.branch_weights() if index not in self.mine}
        return {
            name: parameter
            for name, parameter in trainable_parameters(self.model).items()
            if id(parameter) not in others
        }

    def clip(self, most: float) -> None:
        """Bring gradients together, and scale them so that the norm of all slots' together is `most` at most."""
        own = {id(parameter) for block in self.blocks for parameter in block.experts.parameters()}
        found = [parameter for parameter in trainable_parameters(self.model).values() if parameter.grad is not None]
        apart = [each.grad for each in found if id(each) in own and each.grad is not None]
        shared = [each.grad for each in found if id(each) not in own and each.grad is not None]
        sum_gradients(shared, self.branch.get_group())
        if self.data.size() > 1:
            sum_gradients([*apart, *shared], self.data.get_group(), self.data.size())
        squares = torch.stack([grad.square().sum() for grad in apart]).sum() if apart else torch.zeros(())
        squares = squares.to(found[0].device)
        distributed.all_reduce(squares, group=self.branch.get_group())
        norm = (squares + sum(grad.square().sum() for grad in shared)).sqrt()
        torch.nn.utils.clip_grads_with_norm_(found, most, norm)

    def collect(self, due: bool) -> None:
        """Give every process all slots' branches where that is due. For all."""
        for index, parameter in self.branch_weights() if due else ():
            owner = self.owners[index]
            if self.slot != owner:
                parameter.data = torch.empty(self.shapes[parameter], dtype=parameter.dtype, device=parameter.device)
            distributed.broadcast(parameter.data, group=self.branch.get_group(), group_src=owner)


def sum_gradients(grads: list[Tensor], group: Any, count: int = 1) -> None:
    """Sum gradients over a group, in place and all at once, and divide them by a number."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat, group=group)
        for grad, piece in zip(grads, torch.split(flat / count, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


class BlockExchange:
    """What a block of a model whose branches are spread does with its input.

    Attributes:
        mine: The branches that run here.
    """

    def __init__(self, mesh: Any, mine: Sequence[int], in_flight: int = 1, *, splits: bool) -> None:
        """Take a block's place.

        Args:
            mesh: The slots'.
            mine: The branches that run here.
            in_flight: Micro-batches in which rows pass through the blocks.
            splits: Whether each slot is left a part of the rows of its output: the last block, in training.
        """
        self.mesh, self.mine, self.in_flight, self.splits = mesh, mine, in_flight, splits

    def __call__(self, block: Block, states: Tensor | list[Tensor], calls: Sequence[Call]) -> Any:
        """Return a block's output, (B, S, d), or (B / K, S, d) where it splits; of micro-batches in flight a list.

        Between blocks these stay apart: the next block's first begins while the second's sum is on its way. Each is
        waited for where it is used. In the backward pass torch goes through what was computed last first, which is the
        other way round and as much apart.
        """
        parts = list(states.chunk(self.in_flight)) if isinstance(states, Tensor) else states
        left, means, wanted = [], [], []
        for number, part in enumerate(parts):
            mine = calls if len(parts) == 1 else select_rows(calls, number, len(parts), len(part))
            left.append(self.leave(block.mix(self.enter(part), mine, self.mine)))
            means.append(block.weights)
            wanted.append(block.gate.auxiliary)
        if len(parts) == 1:
            return left[0]
        block.weights = torch.stack([mean for mean in means if mean is not None]).mean(dim=0)
        if losses := [each for each in wanted if each is not None]:
            block.gate.auxiliary = torch.stack(losses).mean()  # as of micro-batches that are accumulated
        return torch.cat(left) if self.splits else left

    def enter(self, states: Tensor) -> Tensor:
        """Return a block's input, (B, S, d), whose gradient is the sum of all slots'."""
        if not states.requires_grad:
            return states
        same = DTensor.from_local(states, self.mesh, [Replicate()], run_check=False)
        if self.in_flight > 1:  # nothing forward; backward it sums without waiting
            same = same.redistribute(placements=[Replicate()], async_op=True)
        entered: Tensor = same.to_local(grad_placements=[Partial()])
        return entered

    def leave(self, mixed: Tensor) -> Tensor:
        """Return the sum of all slots' outputs, (B, S, d), or this slot's rows of it, (B / K, S, d)."""
        parts = DTensor.from_local(mixed, self.mesh, [Partial()], run_check=False)
        goal = [Shard(0) if self.splits else Replicate()]
        summed: Tensor = parts.redistribute(placements=goal, async_op=self.in_flight > 1).to_local()
        return summed


def select_rows(calls: Sequence[Call], number: int, parts: int, count: int) -> list[Call]:
    """Return what is meant for the layers, for one of several micro-batches of so many rows.

    What has as many rows as all of them together, such as a mask, has its own for each.
    """

    def cut(value: Any) -> Any:
        own = isinstance(value, Tensor) and value.ndim > 1 and len(value) == parts * count
        return value[number * count :][:count] if own else value

    return [tree_map(cut, call) for call in calls]


def spread_finished(model: nn.Module) -> None:
    """Spread a finished model's branches over all processes, each of which forgets the others'.

    Raises:
        ConfigError: There is one process, or nothing to spread.
    """
    if processes.world_size() == 1:
        raise ConfigError("--layout mpmd needs several processes: `mode launch --nproc 2 generate ... --layout mpmd`")
    MPMD(model, next(model.parameters()).device).part_for_good()


def check_placement(placement: Sequence[Sequence[int]], branches: int) -> None:
    """Refuse a placement over slots that does not have every branch once, or whose slots do not divide the processes.

    Raises:
        ConfigError: It does not.
    """
    from mode.core.errors import ConfigError

    if sorted(index for slot in placement for index in slot) != list(range(branches)) or not all(placement):
        raise ConfigError(
            f"train.parallelism.placement: not each of the branches {list(range(branches))}, the backbone being 0, "
            "in one slot"
        )
    if len(placement) < 2 or world_size() % len(placement):
        raise ConfigError(
            f"train.parallelism.placement: {world_size()} processes do not divide over {len(placement)} slots"
        )
