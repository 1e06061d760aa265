"""Batches as a pure function of (seed, step): resuming needs no state of a loader."""

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
        name: The domain.
        tokens: Its tokens.
        weight: Rows it gives in every cycle of the mixture.
    """

    name: str
    tokens: Tokens
    weight: int


class Batches:
    """Rows of a mixture of domains, sampled without replacement within an epoch of each domain.

    Rows come in a fixed cycle of sum(weight) rows, so a mix of equal weights has equal sample counts at every length.
    Within a domain every epoch permutes the windows anew and shifts their boundaries. With a number of examples, those
    are the first rows that a mix without it would have, and later epochs permute the same ones.
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
        """Check that every stream fills at least one row.

        Args:
            streams: Streams of the mixture.
            seed: Seed of the run.
            batch_size: Rows of an optimizer step.
            sequence_length: Tokens of a row.
            order: Sets apart orders under one seed, so that a stage does not repeat the rows of the one before.
            examples: Different rows in the whole mixture, shared as its cycle shares them; all by default.

        Raises:
            ConfigError: A stream is shorter than one row, or a weight is below one.
        """
        for stream in streams:
            if stream.weight < 1:
                raise ConfigError(f"domain {stream.name}: weight {stream.weight} in the mixture is below 1")
            if len(stream.tokens) < 2 * sequence_length + 1:
                raise ConfigError(
                    f"domain {stream.name}: {len(stream.tokens)} training tokens do not fill two rows of "
                    f"{sequence_length}; use more text or a smaller train.sequence_length"
                )
        self.streams = streams
        self.seed, self.order = seed, order
        self.batch_size, self.sequence_length = batch_size, sequence_length
        rounds = max(stream.weight for stream in streams)
        self.cycle = [i for turn in range(rounds) for i, stream in enumerate(streams) if turn < stream.weight]
        self.examples = examples
        if examples is not None and examples < len(self.cycle):
            raise ConfigError(f"train.batch.examples={examples}: a cycle of this mix has {len(self.cycle)} rows")
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
        num_rows = num_windows if self.examples is None else min(num_windows, self.share(which))
        epoch, position = divmod(nth, num_rows)
        if self._orders.get(which, (-1,))[0] != epoch:
            self._orders[which] = (epoch, *self.permuted(which, epoch, num_windows, num_rows))
        _, order, shift = self._orders[which]
        start = int(order[position]) * self.sequence_length + shift
        return np.asarray(stream.tokens[start : start + self.sequence_length + 1], np.int64)

    def share(self, which: int) -> int:
        """Return how many of the examples are a stream's; the first streams of the cycle take what does not divide."""
        whole, rest = divmod(self.examples or 0, len(self.cycle))
        return whole * self.streams[which].weight + self.cycle[:rest].count(which)

    def permuted(self, which: int, epoch: int, num_windows: int, num_rows: int) -> tuple[NDArray[np.int64], int]:
        """Return the order of a stream's windows in an epoch, and how far their boundaries are shifted."""
        fixed = self.examples is not None and self.share(which) <= num_windows
        first = self.random(which, 0 if fixed else epoch)
        order, shift = first.permutation(num_windows), int(first.integers(self.sequence_length))
        if not fixed or epoch == 0:
            return order, shift
        return self.random(which, epoch).permutation(order[:num_rows]), shift

    def random(self, which: int, epoch: int) -> np.random.Generator:
        """Return the source of a stream's order in an epoch."""
        return np.random.Generator(
            np.random.Philox(key=[self.seed, self.order * 2**16 + which], counter=[epoch, 0, 0, 0])
        )
