"""Score a finished run on rows in which the domain changes at known borders.

A row is a sequence of segments of equal length. Its domains follow each other in a circle, forwards in one row and
backwards in the next, so every change from one domain to another is equally frequent. The segments of a domain are
consecutive pieces of its split. Nothing in a row marks a border.

The distance of a token is the number of tokens of its segment before it. The first segment of a row is not scored,
because no other domain comes before it. Every scored token is also scored in rows of its own domain, as `mode eval`
does, so that the cost of the change is seen on the same tokens.

Shapes: R rows, T tokens per row, K segments per row, D documents of a domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mode.core.device import choose_rows_per_pass, describe_device
from mode.core.errors import ConfigError
from mode.data.pack import PackedSplit
from mode.downstream.mixed_results import COLLECTION, SCHEMA, SEGMENTS, MixedResult
from mode.evaluation.next_token import score_stream
from mode.ops.loss import score_tokens
from mode.records.command import describe_method
from mode.records.measurement import make_id
from mode.records.provenance import describe_environment
from mode.runs.execute import load_finished
from mode.runs.prepare import Prepared, prepare_run, require_finished
from mode.train.objective import UNKNOWN, set_row_kinds

if TYPE_CHECKING:
    from torch import nn

    from mode.config.run import Run


@dataclass(frozen=True)
class MixedRows:
    """Rows of segments.

    Attributes:
        tokens: The tokens, (R, T).
        domains: Number of the domain of every segment, (R, K).
        offsets: Place of every segment's first token in the stream of its domain, (R, K).
    """

    tokens: NDArray[np.int64]
    domains: NDArray[np.int64]
    offsets: NDArray[np.int64]


def make_mixed_rows(streams: Sequence[NDArray[Any]], segment: int, row: int) -> MixedRows:
    """Return as many rows as the shortest stream allows, in which all changes are equally frequent.

    The first token of a stream is left out, because `mode eval` does not score it.

    Args:
        streams: Tokens of every domain, at least two.
        segment: Tokens per segment.
        row: Maximum number of tokens per row.

    Raises:
        ConfigError: A row has no room for two segments, or a stream is too short.

    >>> made = make_mixed_rows([np.arange(9), 10 + np.arange(9)], segment=2, row=4)
    >>> made.tokens.tolist()
    [[1, 2, 11, 12], [3, 4, 13, 14], [15, 16, 5, 6], [17, 18, 7, 8]]
    """
    places = row // segment
    if places < 2:
        raise ConfigError(f"rows of {row} tokens have no room for two segments of {segment} tokens")
    circle = 2 * len(streams)  # rows after which every domain has had every place, in both directions
    per_domain = min(len(stream) - 1 for stream in streams) // segment
    rounds = per_domain // (2 * places)  # segments of a domain in a circle
    if rounds == 0:
        raise ConfigError(f"the shortest split has {per_domain} segments of {segment} tokens; {2 * places} are needed")
    numbers = np.arange(rounds * circle)[:, None]
    turns = np.where(numbers % 2, -1, 1) * np.arange(places)
    domains: NDArray[np.int64] = ((numbers // 2 + turns) % len(streams)).astype(np.int64)
    offsets = np.zeros_like(domains)
    for domain in range(len(streams)):
        mine = domains == domain
        offsets[mine] = 1 + segment * np.arange(mine.sum())
    parts = [
        np.asarray(streams[int(domain)][offset : offset + segment], np.int64)
        for domain, offset in zip(domains.flat, offsets.flat, strict=True)
    ]
    return MixedRows(np.concatenate(parts).reshape(len(domains), places * segment), domains, offsets)


@torch.no_grad()
def find_row_hits(
    model: nn.Module, tokens: NDArray[np.int64], bos: int | None, batch_size: int, chunk: int
) -> NDArray[np.bool_]:
    """Return which tokens of rows the model predicts, (R, T). The first of a row is never predicted without `bos`.

    Args:
        model: A causal LM in evaluation mode.
        tokens: The rows, (R, T).
        bos: Token before every row; None for none.
        batch_size: Rows per forward pass, at most.
        chunk: Tokens whose logits exist at one time.
    """
    device = next(model.parameters()).device
    hits = np.zeros(tokens.shape, np.bool_)
    skipped = 1 if bos is None else 0
    size = choose_rows_per_pass(device, batch_size, tokens.shape[1])
    for start in range(0, len(tokens), size):
        rows = torch.from_numpy(tokens[start : start + size]).to(device)
        before = rows[:, :-1] if bos is None else torch.nn.functional.pad(rows[:, :-1], (1, 0), value=bos)
        targets = rows[:, skipped:]
        found = score_tokens(model, before, targets, chunk).hit
        hits[start : start + size, skipped:] = found.view(targets.shape).cpu().numpy()
    return hits


def count_by_distance(
    rows: MixedRows, hits: NDArray[np.bool_], alone: Mapping[str, NDArray[np.bool_]], splits: Mapping[str, PackedSplit]
) -> dict[str, list[dict[str, Any]]]:
    """Return, by domain, the scored tokens and those predicted, for each band of distances and each document.

    Bands are 0, 1, 2 to 3, 4 to 7, and so on.

    Args:
        rows: The rows.
        hits: Tokens that are predicted in them, (R, T).
        alone: Tokens that are predicted in rows of one domain, by domain: for every token of the stream but the first.
        splits: The splits that the rows are made of, by domain.

    Returns:
        By domain a list of bands. A band has `first`, its smallest distance, and for each document `tokens`, `hits` and
        `alone`, (D,) each.
    """
    count, places = rows.domains.shape
    segment = rows.tokens.shape[1] // places
    distance = np.arange(segment)
    band = np.where(distance == 0, 0, 1 + np.log2(np.maximum(distance, 1)).astype(np.int64))
    found: dict[str, list[dict[str, Any]]] = {}
    for number, (name, split) in enumerate(splits.items()):
        mine = (rows.domains == number) & (np.arange(places) > 0)
        stream = rows.offsets[mine][:, None] + distance  # place in the stream, (segments, segment)
        kept = np.ones(stream.shape, np.bool_) if split.bos is None else np.asarray(split.tokens)[stream] != split.bos
        document = np.searchsorted(split.starts, stream, side="right") - 1
        seen = {"tokens": kept, "hits": hits.reshape(count, places, segment)[mine], "alone": alone[name][stream - 1]}
        found[name] = [
            {"first": int(distance[band == each][0])}
            | {
                key: np.bincount(
                    document[:, band == each][(kept & values)[:, band == each]], minlength=len(split.starts) - 1
                ).tolist()
                for key, values in seen.items()
            }
            for each in range(band[-1] + 1)
        ]
    return found


def choose_segments(run: Run) -> list[int]:
    """Return the lengths of segments of which a row of the run has room for two.

    Raises:
        ConfigError: There are none, or the run scores a single domain.
    """
    row = run.train.sequence_length
    if len(run.scored) < 2:
        raise ConfigError(f"evaluate.domains={list(run.scored)}: mixed rows need at least two domains")
    if row < 2 * SEGMENTS[0]:
        raise ConfigError(f"train.sequence_length={row}: mixed rows need at least {2 * SEGMENTS[0]} tokens")
    return [each for each in SEGMENTS if 2 * each <= row]


def score_mixed(
    run: Run, done: Callable[[str], None] = lambda text: None, extra: Path | None = None
) -> tuple[MixedResult, Path]:
    """Score a finished run on mixed rows; return the result and the path of the file that has it.

    Args:
        run: The run.
        done: Called with a description of every length of segments that is scored.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: The run is not finished, its weights are missing or changed, it scores a single domain, or its
            rows or its splits are too short.
    """
    prepared = prepare_run(run)
    record = require_finished(prepared)
    row, segments = run.train.sequence_length, choose_segments(run)
    splits = {name: prepared.packed[name].split(run.evaluate.split) for name in run.scored}
    made = {each: make_mixed_rows([split.tokens for split in splits.values()], each, row) for each in segments}
    folder = prepared.results / COLLECTION.name
    folder.mkdir(parents=True, exist_ok=True)  # fails before any work if the folder is not writable
    model, device = load_finished(prepared)
    if prepared.method.row_kinds(run):  # no row says what its domains are
        set_row_kinds(model, torch.tensor([UNKNOWN]).to(device))
    alone = find_hits_alone(prepared, model, splits)
    cases = []
    for segment, rows in made.items():
        bos = next(iter(splits.values())).bos
        hits = find_row_hits(model, rows.tokens, bos, run.evaluate.batch_size, run.evaluate.logit_chunk_size)
        cases.append({"segment": segment, "rows": len(rows.tokens)} | count_by_distance(rows, hits, alone, splits))
        done(f"a change every {segment} tokens: {len(rows.tokens)} rows")
    asked = {
        "run": record.id,
        "run_name": record.filename.removesuffix(f"-{record.id}.json"),
        "backbone": run.backbone.name,
        "targets": list(run.targets),
        "domains": list(run.scored),
        "split": run.evaluate.split,
        "row": row,
        "segments": segments,
    }
    identity = make_id(asked)
    asked["method"], asked["variant"] = describe_method(record, extra)
    environment = {"data": prepared.fingerprints, "backbone": prepared.backbone}
    environment |= describe_environment(describe_device(device), run.train.threads)
    result = MixedResult(SCHEMA, identity, asked, {"cases": cases}, environment)
    return result, result.write(folder)


def find_hits_alone(
    prepared: Prepared, model: nn.Module, splits: Mapping[str, PackedSplit]
) -> dict[str, NDArray[np.bool_]]:
    """Return which tokens of every split the model predicts in rows of that domain: all but the first of a split."""
    evaluate = prepared.run.evaluate
    return {
        name: score_stream(
            model,
            split,
            sequence_length=prepared.run.train.sequence_length,
            batch_size=evaluate.batch_size,
            chunk=evaluate.logit_chunk_size,
        ).hit
        for name, split in splits.items()
    }
