"""What processes send each other, counted where torch is asked for it: nothing is left out, whoever asks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "all_reduce": "all_reduce",
    "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
}
"""Collectives, by the names of their operators: the functional ones, and those that work in place."""


class Traffic(TorchDispatchMode):
    """Counts collectives within its context.

    Attributes:
        found: In their order: the collective, and the bytes of the whole tensor: what every process ends up with of an
            all_gather, begins with of a reduce_scatter, and both of an all_reduce.
    """

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.found: list[tuple[str, int]] = []

    @property
    def counts(self) -> dict[str, int]:
        """Number of each collective."""
        kinds = [kind for kind, _ in self.found]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    @property
    def bytes(self) -> int:
        """Bytes that pass through each process's link in each direction but for a factor (D - 1) / D, in rings."""
        return sum(size * (2 if kind == "all_reduce" else 1) for kind, size in self.found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it if it is a collective."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        kind = NAMES.get(name.rpartition("::")[2]) if "c10d" in name else None
        if kind:
            sizes = [each.nbytes for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
            self.found.append((kind, max(sizes)))
        return result
