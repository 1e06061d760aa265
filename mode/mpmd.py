"""Branches of a MoDE model side by side on different processes: the paper's MPMD layout, on DTensor placements.

K slots of D / K processes each. A process runs the branches of its slot alone; every process has the gates and the
head. Before a block its input is the same in all slots, and its gradient is summed over them; after it the slots'
outputs are summed (equation 2). The last block's sum leaves each slot a part of the rows, so that head and loss are
shared. Frozen weights aside, an expert's gradients and moments exist in its slot alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from mode import parallel
from mode.checked import ConfigError
from mode.checkpoint import MOMENTS, trainable
from mode.modular import Block, blocks_of


class Branches:
    """A modular model whose branches are spread over the slots of all processes.

    Attributes:
        slots: K.
        slot: This process's slot.
        mine: The branches that it runs, by number; 0 is the backbone's.
        halves: Whether frozen matrices can be held in bf16 in a step.
        model: What trains.
    """

    halves = True

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Place the branches: the backbone in the first slot, experts in turn in the others.

        Raises:
            ConfigError: There are no branches to spread, too few processes, or gates that read what only one slot has.
        """
        self.model = model
        self.blocks = [block for block in blocks_of(model) if isinstance(block, Block)]
        self.check()
        experts = len(self.blocks[0].experts)
        self.slots = max(count for count in range(2, experts + 2) if parallel.size() % count == 0)
        parallel.meet()
        names = ("branch", "data")
        shape = (self.slots, parallel.size() // self.slots)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.branch, self.data = (mesh[name] for name in names)
        self.slot = self.branch.get_local_rank()
        self.owners = [0, *(1 + index % (self.slots - 1) for index in range(experts))]
        self.mine = [index for index, owner in enumerate(self.owners) if owner == self.slot]

    def check(self) -> None:
        """Refuse what cannot be spread."""
        if not self.blocks:
            raise ConfigError("layout mpmd: MoDE alone has branches to spread")
        if len(self.blocks) < len(blocks_of(self.model)) or self.blocks[0].gate.settings.reads == "output":
            raise ConfigError("layout mpmd goes with method.head_rank=0 and method.gate.reads=input")
        most = 1 + len(self.blocks[0].experts)
        if not any(parallel.size() % count == 0 for count in range(2, most + 1)):
            raise ConfigError(f"layout mpmd: {parallel.size()} processes are no multiple of 2 to {most} slots")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Let the blocks run their slot's branches alone for a while."""
        for number, block in enumerate(self.blocks):
            block.spread = Join(self.branch, self.mine, splits=number == len(self.blocks) - 1)
        try:
            yield
        finally:
            for block in self.blocks:
                block.spread = None

    def part_for_good(self) -> None:
        """Forget the other slots' branches, and let blocks run their own from now on, for text token by token.

        What an expert knows stays in its slot: it sends hidden states alone.
        """
        for block in self.blocks:
            block.spread = Join(self.branch, self.mine, splits=False)
            for index, layers in enumerate([block.backbone, *block.experts]):
                for parameter in layers.parameters() if index not in self.mine else ():
                    parameter.data = torch.empty(0, device=parameter.device)

    def rows(self, values: Any) -> Any:
        """Return the rows of a step that this process reads: all of its slot's."""
        part = len(values) // self.data.size()
        return values[self.data.get_local_rank() * part :][:part]

    def part(self, rows: Tensor) -> Tensor:
        """Return the rows that are left to this slot after the last block."""
        return rows.chunk(self.slots)[self.slot]

    def seed(self, seed: int) -> int:
        """Return a seed that is the same in all slots."""
        return parallel.own_seed(seed, self.data.get_local_rank())

    def wrap(self, objective: nn.Module, optimizer: Any, remake: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return what a step runs, and its optimizer: gradients are brought together in `clip`."""
        return objective, optimizer

    def clip(self, most: float) -> None:
        """Bring gradients together, and scale them so that the norm of all slots' together is `most` at most."""
        own = {id(parameter) for block in self.blocks for parameter in block.experts.parameters()}
        found = [parameter for parameter in trainable(self.model).values() if parameter.grad is not None]
        apart = [each.grad for each in found if id(each) in own and each.grad is not None]
        shared = [each.grad for each in found if id(each) not in own and each.grad is not None]
        together(shared, self.branch.get_group())
        if self.data.size() > 1:
            together([*apart, *shared], self.data.get_group(), self.data.size())
        squares = torch.stack([grad.square().sum() for grad in apart]).sum() if apart else torch.zeros(())
        squares = squares.to(found[0].device)
        distributed.all_reduce(squares, group=self.branch.get_group())
        norm = (squares + sum(grad.square().sum() for grad in shared)).sqrt()
        torch.nn.utils.clip_grads_with_norm_(found, most, norm)

    def collect(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Give every process all slots' experts, with their moments, and return the optimizer that has them."""
        for block in self.blocks:
            for index, expert in enumerate(block.experts):
                for parameter in expert.parameters():
                    if parameter.requires_grad:
                        self.spread(parameter, optimizer, self.owners[index + 1])
        return optimizer

    def spread(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, owner: int) -> None:
        """Send a slot's weight and its moments to the other slots."""
        state = optimizer.state[parameter]
        if self.slot != owner:
            state |= {moment: torch.empty_like(parameter.data) for moment in MOMENTS} | {
                "step": torch.zeros((), device=parameter.device)
            }
        for tensor in (parameter.data, state["step"], *(state[moment] for moment in MOMENTS)):
            distributed.broadcast(tensor, group=self.branch.get_group(), group_src=owner)


def together(grads: list[Tensor], group: Any, count: int = 1) -> None:
    """Sum gradients over a group, in place and all at once, and divide them by a number."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat, group=group)
        for grad, piece in zip(grads, torch.split(flat / count, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


class Join:
    """What a block does before and after its own branches.

    Attributes:
        mine: The branches that run here.
    """

    def __init__(self, mesh: Any, mine: list[int], *, splits: bool) -> None:
        """Keep the slots' mesh; `splits`: whether each slot is left a part of the rows."""
        self.mesh, self.mine, self.splits = mesh, mine, splits

    def enter(self, states: Tensor) -> Tensor:
        """Return a block's input, (B, S, d), whose gradient is the sum of all slots'."""
        if not states.requires_grad:
            return states
        same = DTensor.from_local(states, self.mesh, [Replicate()], run_check=False)
        entered: Tensor = same.to_local(grad_placements=[Partial()])
        return entered

    def leave(self, mixed: Tensor) -> Tensor:
        """Return the sum of all slots' outputs, (B, S, d), or this slot's rows of it, (B / K, S, d)."""
        parts = DTensor.from_local(mixed, self.mesh, [Partial()], run_check=False)
        summed: Tensor = parts.redistribute(placements=[Shard(0) if self.splits else Replicate()]).to_local()
        return summed


def spread_for_good(model: nn.Module) -> None:
    """Spread a finished model's branches over all processes, each of which forgets the others'.

    Raises:
        ConfigError: There is one process, or nothing to spread.
    """
    if parallel.size() == 1:
        raise ConfigError("--layout mpmd needs several processes: `mode launch --nproc 2 generate ... --layout mpmd`")
    Branches(model, next(model.parameters()).device).part_for_good()
