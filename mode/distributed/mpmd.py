"""Branches of a MoDE model side by side in different processes: the paper's MPMD layout, on DTensor placements.

D processes form K slots of D / K processes each. A process runs the branches of its slot alone; every process has the
gates and the head. The input of a block is the same in all slots, and its gradient is summed over the slots; the
slots' outputs are summed (equation 2). The sum after the last block is scattered: each slot gets a part of the rows, so
that head and loss are shared. A branch's weights, gradients and optimizer state exist in its slot alone; while the
model is scored, every process has all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils._pytree import tree_map

from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.tensors import list_trainable
from mode.modular.block import Block, find_blocks
from mode.modular.branches import Call


class MPMD:
    """A modular model whose branches are placed in the slots of all processes.

    Attributes:
        slots: K.
        slot: Slot of this process.
        owners: Slot of every branch, by index; branch 0 is the backbone.
        local: Branches that this process runs.
        supports_bf16_weights: Whether frozen matrices can be in bf16 during a step.
        model: The model that trains.
    """

    supports_bf16_weights = True

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
            device: Device of this process.
            in_flight: Micro-batches in which rows pass through the blocks.
            placement: Branches of every slot; balanced by default.

        Raises:
            ConfigError: The model has no branches, there are too few processes, gates read what only one slot has, or
                the placement does not match the model's branches.
        """
        self.model, self.in_flight = model, in_flight
        self.blocks = [block for block in find_blocks(model) if isinstance(block, Block)]
        self.check_model()
        placement = self.balance_branches() if placement is None else placement
        check_placement(placement, 1 + len(self.blocks[0].experts))
        self.slots = len(placement)
        processes.ensure_initialized()
        names = ("branch", "data")
        shape = (self.slots, processes.world_size() // self.slots)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.branch, self.data = (mesh[name] for name in names)
        self.slot = self.branch.get_local_rank()
        slots = {index: slot for slot, chosen in enumerate(placement) for index in chosen}
        self.owners = [slots[index] for index in range(len(slots))]
        self.local = [index for index, owner in enumerate(self.owners) if owner == self.slot]
        self.shapes = {parameter: parameter.shape for _, parameter in self.iterate_branch_parameters()}

    def check_model(self) -> None:
        """Check that the model has blocks whose branches can run in different processes."""
        if not self.blocks:
            raise ConfigError("train.parallelism.strategy=mpmd: only MoDE has branches to place")
        if len(self.blocks) < len(find_blocks(self.model)) or self.blocks[0].gate.settings.reads == "output":
            raise ConfigError(
                "train.parallelism.strategy=mpmd goes with method.head_rank=0 and method.gate.reads=input"
            )

    def balance_branches(self) -> list[list[int]]:
        """Return a placement in as many slots as the processes allow, with balanced work: the longest branch first.

        Raises:
            ConfigError: The number of processes is a multiple of no possible number of slots.
        """
        branches = [self.blocks[0].backbone, *self.blocks[0].experts]
        counts = [count for count in range(2, len(branches) + 1) if processes.world_size() % count == 0]
        if not counts:
            raise ConfigError(
                f"train.parallelism.strategy=mpmd: {processes.world_size()} processes are no multiple of 2 to "
                f"{len(branches)} slots"
            )
        # A weight is used once forward, and backward once for the input and once for its own gradient if it trains.
        work = [sum(2 + each.requires_grad for each in branch.parameters()) for branch in branches]
        chosen: list[list[int]] = [[] for _ in range(max(counts))]
        for index in sorted(range(len(branches)), key=lambda index: -work[index]):
            min(chosen, key=lambda slot: sum(work[each] for each in slot)).append(index)
        return sorted(sorted(slot) for slot in chosen)

    def iterate_branch_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield every branch's parameters with the index of the branch, block by block."""
        for block in self.blocks:
            for index, layers in enumerate([block.backbone, *block.experts]):
                for parameter in layers.parameters():
                    yield index, parameter

    def free_remote_branches(self) -> None:
        """Free the weights of the other slots' branches."""
        for index, parameter in self.iterate_branch_parameters():
            if index not in self.local and parameter.numel():
                parameter.data = torch.empty(0, device=parameter.device)

    @contextmanager
    def enter_step(self) -> Iterator[None]:
        """Run the local branches alone in every block, and free the weights of the others."""
        self.free_remote_branches()
        last, before = self.blocks[-1], {block: block.execution for block in self.blocks}
        for block in self.blocks:
            exchange = BlockExchange(self.branch, self.local, self.in_flight, splits=block is last)
            block.execution = replace(block.execution, exchange=exchange)
        try:
            yield
        finally:
            for block in self.blocks:
                block.execution = before[block]

    def distribute_for_generation(self) -> None:
        """Run the local branches alone from now on, for text token by token, and free the weights of the others.

        An expert's weights stay in its slot, which sends hidden states alone.
        """
        self.free_remote_branches()
        for block in self.blocks:
            exchange = BlockExchange(self.branch, self.local, splits=False)
            block.execution = replace(block.execution, exchange=exchange)

    def select_rows(self, values: Tensor) -> Tensor:
        """Return those rows of a step, (B, ...), that this process reads: the same in all slots."""
        part = len(values) // self.data.size()
        return values[self.data.get_local_rank() * part :][:part]

    def select_loss_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of this slot after the last block, (B / K, ...): its part of every micro-batch in flight."""
        return torch.cat([some.chunk(self.slots)[self.slot] for some in rows.chunk(self.in_flight)])

    def derive_seed(self, seed: int) -> int:
        """Return a seed that is the same in all slots."""
        return processes.derive_seed(seed, self.data.get_local_rank())

    def wrap(self, objective: Any, make_optimizer: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Free the other slots' branches, and return the objective and its optimizer."""
        optimizer = make_optimizer(self.model)
        self.free_remote_branches()
        return objective, optimizer

    def find_local_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of this slot, by name."""
        others = {id(parameter) for index, parameter in self.iterate_branch_parameters() if index not in self.local}
        return {
            name: parameter for name, parameter in list_trainable(self.model).items() if id(parameter) not in others
        }

    def clip_gradients(self, max_norm: float) -> None:
        """Reduce the gradients over processes, and scale them so that the norm over all slots is at most `max_norm`."""
        own = {id(parameter) for block in self.blocks for parameter in block.experts.parameters()}
        found = [parameter for parameter in list_trainable(self.model).values() if parameter.grad is not None]
        local = [each.grad for each in found if id(each) in own and each.grad is not None]
        shared = [each.grad for each in found if id(each) not in own and each.grad is not None]
        sum_gradients(shared, self.branch.get_group())
        if self.data.size() > 1:
            sum_gradients([*local, *shared], self.data.get_group(), self.data.size())
        squares = torch.stack([grad.square().sum() for grad in local]).sum() if local else torch.zeros(())
        squares = squares.to(found[0].device)
        distributed.all_reduce(squares, group=self.branch.get_group())
        norm = (squares + sum(grad.square().sum() for grad in shared)).sqrt()
        torch.nn.utils.clip_grads_with_norm_(found, max_norm, norm)

    def gather_weights(self, due: bool) -> None:
        """Give every process the branches of all slots, if due. Collective: all processes must call it."""
        for index, parameter in self.iterate_branch_parameters() if due else ():
            owner = self.owners[index]
            if self.slot != owner:
                parameter.data = torch.empty(self.shapes[parameter], dtype=parameter.dtype, device=parameter.device)
            distributed.broadcast(parameter.data, group=self.branch.get_group(), group_src=owner)


def sum_gradients(grads: list[Tensor], group: Any, count: int = 1) -> None:
    """Sum gradients over a group, in place and in one collective, and divide them by a number."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat, group=group)
        for grad, piece in zip(grads, torch.split(flat / count, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


class BlockExchange:
    """Runs a block whose branches are in different slots.

    Attributes:
        local: Branches that run in this process.
    """

    def __init__(self, mesh: Any, local: Sequence[int], in_flight: int = 1, *, splits: bool) -> None:
        """Describe the placement of a block.

        Args:
            mesh: Device mesh of the slots.
            local: Branches that run in this process.
            in_flight: Micro-batches in which rows pass through the blocks.
            splits: Whether each slot gets a part of the rows of the output: the last block, in training.
        """
        self.mesh, self.local, self.in_flight, self.splits = mesh, local, in_flight, splits

    def __call__(self, block: Block, states: Tensor | list[Tensor], calls: Sequence[Call]) -> Any:
        """Return a block's output, (B, S, d), or (B / K, S, d) where it splits; a list of micro-batches in flight.

        Between blocks the micro-batches stay separate: the next block starts on the first while the sum of the second
        is in transit. Each is waited for where it is used. The backward pass runs in reverse order, and overlaps in the
        same way.
        """
        parts = list(states.chunk(self.in_flight)) if isinstance(states, Tensor) else states
        outputs, means, auxiliary = [], [], []
        for number, part in enumerate(parts):
            part_calls = calls if len(parts) == 1 else select_rows(calls, number, len(parts), len(part))
            outputs.append(self.sum_outputs(block.mix(self.replicate_input(part), part_calls, self.local)))
            means.append(block.weights)
            auxiliary.append(block.gate.auxiliary)
        if len(parts) == 1:
            return outputs[0]
        block.weights = torch.stack([mean for mean in means if mean is not None]).mean(dim=0)
        if losses := [each for each in auxiliary if each is not None]:
            block.gate.auxiliary = torch.stack(losses).mean()  # as over accumulated micro-batches
        return torch.cat(outputs) if self.splits else outputs

    def replicate_input(self, states: Tensor) -> Tensor:
        """Return a block's input, (B, S, d), with a gradient that is summed over the slots."""
        if not states.requires_grad:
            return states
        same = DTensor.from_local(states, self.mesh, [Replicate()], run_check=False)
        if self.in_flight > 1:  # no communication in the forward pass; in the backward pass the sum is asynchronous
            same = same.redistribute(placements=[Replicate()], async_op=True)
        entered: Tensor = same.to_local(grad_placements=[Partial()])
        return entered

    def sum_outputs(self, mixed: Tensor) -> Tensor:
        """Return the sum of all slots' outputs, (B, S, d), or the rows of this slot, (B / K, S, d)."""
        parts = DTensor.from_local(mixed, self.mesh, [Partial()], run_check=False)
        goal = [Shard(0) if self.splits else Replicate()]
        summed: Tensor = parts.redistribute(placements=goal, async_op=self.in_flight > 1).to_local()
        return summed


def select_rows(calls: Sequence[Call], number: int, parts: int, count: int) -> list[Call]:
    """Return the layers' arguments for micro-batch `number` of `parts`, each with `count` rows.

    Tensors with a row for every row of the batch, such as a mask, are sliced; all others are shared.
    """

    def cut(value: Any) -> Any:
        own = isinstance(value, Tensor) and value.ndim > 1 and len(value) == parts * count
        return value[number * count :][:count] if own else value

    return [tree_map(cut, call) for call in calls]


def distribute_branches(model: nn.Module) -> None:
    """Place a finished model's branches in all processes; each frees the weights of the others.

    Raises:
        ConfigError: There is one process alone, or the model has no branches.
    """
    if processes.world_size() == 1:
        raise ConfigError("--layout mpmd needs several processes: `mode launch --nproc 2 generate ... --layout mpmd`")
    MPMD(model, next(model.parameters()).device).distribute_for_generation()


def check_placement(placement: Sequence[Sequence[int]], branches: int) -> None:
    """Check that a placement has every branch in exactly one slot, and that the slots divide the processes.

    Raises:
        ConfigError: A branch is missing or repeated, or the slots do not divide the processes.
    """
    if sorted(index for slot in placement for index in slot) != list(range(branches)) or not all(placement):
        raise ConfigError(
            f"train.parallelism.placement: not each of the branches {list(range(branches))}, the backbone being 0, "
            "in one slot"
        )
    if len(placement) < 2 or processes.world_size() % len(placement):
        raise ConfigError(
            f"train.parallelism.placement: {processes.world_size()} processes do not divide over {len(placement)} slots"
        )
