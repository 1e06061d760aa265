"""Batches as a pure function of (seed, step). A resumed run needs no state of a data loader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mode.core.errors import ConfigError
from mode.data.pack import Tokens


@dataclass(frozen=True)
class Stream:
    """Token stream of one domain.

    Attributes:
        name: Name of the domain.
        tokens: Tokens of the domain, (num_tokens,).
        weight: Rows of the domain in every cycle of the mixture.
    """

    name: str
    tokens: Tokens
    weight: int


class Batches:
    """Rows of a mixture of domains, sampled without replacement within an epoch of each domain.

    Rows come in a fixed cycle of sum(weight) rows, so domains of equal weight have equal sample counts after every full
    cycle. Every epoch of a domain permutes the domain's windows anew and shifts their boundaries. If `examples` is set,
    the mixture has that many different rows: the first rows of the mixture without a limit. Later epochs permute them.
    """

    def __init__(
        self,
        streams: list[Stream],
        *,
        seed: int,
        batch_size: int,
        sequence_length: int,
        order: int = 0,
        examples: int | None = None,
    ) -> None:
        """Check that every stream fills at least two rows.

        Args:
            streams: Streams of the mixture.
            seed: Seed of the run.
            batch_size: Rows per optimizer step.
            sequence_length: Tokens per row.
            order: Number of the row order under this seed, so that a stage does not repeat the rows of an earlier one.
            examples: Different rows in the whole mixture, divided among the streams like the rows of a cycle; by
                default, all rows.

        Raises:
            ConfigError: A stream is shorter than two rows, a weight is below one, or `examples` is less than one cycle.
        """
        for stream in streams:
            if stream.weight < 1:
                raise ConfigError(f"domain {stream.name}: weight {stream.weight} in the mixture is below 1")
            if len(stream.tokens) < 2 * sequence_length + 1:
                raise ConfigError(
                    f"domain {stream.name}: {len(stream.tokens)} training tokens do not fill two rows of "
                    f"{sequence_length}; add text or lower train.sequence_length"
                )
        self.streams = streams
        self.seed, self.order = seed, order
        self.batch_size, self.sequence_length = batch_size, sequence_length
        rounds = max(stream.weight for stream in streams)
        self.cycle = [i for turn in range(rounds) for i, stream in enumerate(streams) if turn < stream.weight]
        self.examples = examples
        if examples is not None and examples < len(self.cycle):
            raise ConfigError(
                f"train.batch.examples={examples}: below the {len(self.cycle)} rows of a cycle of this mixture"
            )
        self._orders: dict[int, tuple[int, NDArray[np.int64], int]] = {}

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the rows of an optimizer step, (batch_size, sequence_length + 1)."""
        return np.stack([self.row(step * self.batch_size + i) for i in range(self.batch_size)])

    def domains(self, step: int) -> list[str]:
        """Return the domain of every row of an optimizer step."""
        start = step * self.batch_size
        return [self.streams[self.cycle[(start + i) % len(self.cycle)]].name for i in range(self.batch_size)]

    def row(self, index: int) -> NDArray[np.int64]:
        """Return row number `index` of the run, (sequence_length + 1,)."""
        turn, place = divmod(index, len(self.cycle))
        which = self.cycle[place]
        stream = self.streams[which]
        nth = turn * stream.weight + self.cycle[:place].count(which)
        num_windows = (len(stream.tokens) - 1) // self.sequence_length - 1
        num_rows = num_windows if self.examples is None else min(num_windows, self.count_examples(which))
        epoch, position = divmod(nth, num_rows)
        if self._orders.get(which, (-1,))[0] != epoch:
            self._orders[which] = (epoch, *self.permute_windows(which, epoch, num_windows, num_rows))
        _, order, shift = self._orders[which]
        start = int(order[position]) * self.sequence_length + shift
        return np.asarray(stream.tokens[start : start + self.sequence_length + 1], np.int64)

    def count_examples(self, which: int) -> int:
        """Return a stream's number of examples. The first rows of the cycle take the remainder of the division."""
        whole, rest = divmod(self.examples or 0, len(self.cycle))
        return whole * self.streams[which].weight + self.cycle[:rest].count(which)

    def permute_windows(self, which: int, epoch: int, num_windows: int, num_rows: int) -> tuple[NDArray[np.int64], int]:
        """Return the order of a stream's windows in an epoch, and the shift of the window boundaries in tokens."""
        fixed = self.examples is not None and self.count_examples(which) <= num_windows
        first = self.make_generator(which, 0 if fixed else epoch)
        order, shift = first.permutation(num_windows), int(first.integers(self.sequence_length))
        if not fixed or epoch == 0:
            return order, shift
        return self.make_generator(which, epoch).permutation(order[:num_rows]), shift

    def make_generator(self, which: int, epoch: int) -> np.random.Generator:
        """Return the random generator of a stream's order in an epoch."""
        return np.random.Generator(
            np.random.Philox(key=[self.seed, self.order * 2**16 + which], counter=[epoch, 0, 0, 0])
        )
