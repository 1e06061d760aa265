"""Results of scoring runs on mixed rows, and the tables and the figure that are rendered from them.

Shapes: D documents of a domain.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mode.charts.chart import Axis, Chart, Panel, Point, Series, make_styles
from mode.charts.colours import METHODS, OTHER
from mode.charts.draw import write_chart
from mode.core.escape import escape_markdown
from mode.records.collection import Collection
from mode.records.measurement import Measurement, make_id, pick_fields
from mode.records.metrics import ACCURACY
from mode.records.score import Score
from mode.tables.statistics import Interval, count_effective, interval_over_documents, resample

SCHEMA = 1

SEGMENTS = (32, 64, 128)
"""Tokens between two changes of the domain. Rows too short for two segments of a length are left out."""


STRONG = "**{}**"
"""Format of a cell that is ahead beyond noise."""


INTRODUCTION = (
    "Next-token top-1 accuracy in per cent, mean over domains, on rows in which the domain changes at known borders "
    "that the model is not told. The first segment of a row is not scored. Alone: the same tokens in rows of their own "
    "domain. Lost: alone less mixed, with its standard error over documents. Distance: number of tokens between the "
    "change and a token. Bold: ahead of every other row beyond noise, where the 95 % "
    "interval of each paired difference over documents excludes zero. Variant: settings of the method that differ "
    "from its configuration."
)


@dataclass(frozen=True)
class Band:
    """The tokens of a domain whose distance from the last change is in one band.

    Attributes:
        first: Smallest distance of the band.
        tokens: Scored tokens of each document, (D,).
        hits: Those predicted in mixed rows, (D,).
        alone: Those predicted in rows of one domain, (D,).
    """

    first: int
    tokens: Sequence[int]
    hits: Sequence[int]
    alone: Sequence[int]


def read_band(plain: Mapping[str, Any]) -> Band:
    """Return a band from plain data.

    Raises:
        ValueError: More tokens of a document are predicted than scored, or nothing is scored.
    """
    band = pick_fields(Band, plain)
    tokens = np.asarray(band.tokens)
    for column in ("hits", "alone"):
        found = np.asarray(getattr(band, column))
        if found.shape != tokens.shape or (found < 0).any() or (found > tokens).any():
            raise ValueError(f"{column}: not one number per document, from 0 to tokens")
    if not tokens.any():
        raise ValueError("tokens: none is scored")
    return band


@dataclass(frozen=True)
class MixedResult(Measurement):
    """Scores of a run on mixed rows.

    `asked` has the run, its targets, the settings of its method that differ from the configuration, the domains, the
    split and the lengths of the segments. `happened` has a case for each length, with the bands of every domain.
    """

    def compute_id(self) -> str:
        """Return the id that follows from what was asked. The names of the method and the variant do not count."""
        return make_id({name: value for name, value in self.asked.items() if name not in ("method", "variant")})

    @property
    def filename(self) -> str:
        """Name of the result's file."""
        return f"{self.asked['run_name']}-{self.id}.json"

    @property
    def settings(self) -> list[str]:
        """The settings of the method that differ from the configuration."""
        return shlex.split(str(self.asked["variant"]))

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What two results must share to be compared: the backbone, the data, the split, the rows and the segments."""
        asked, made = self.asked, self.provenance
        data = tuple(sorted(made["data"].items()))
        return asked["backbone"], made["backbone"], data, asked["split"], asked["row"], tuple(asked["segments"])

    @cached_property
    def cases(self) -> dict[int, dict[str, list[Band]]]:
        """Bands by length of a segment and domain."""
        return {
            case["segment"]: {name: [read_band(band) for band in case[name]] for name in self.asked["domains"]}
            for case in self.happened["cases"]
        }

    def score(self, segment: int, column: str, first: int | None = None) -> dict[str, Score]:
        """Return the score of every domain.

        Args:
            segment: Length of a segment.
            column: `hits` in mixed rows, or `alone`.
            first: Smallest distance of one band; None for all bands.
        """
        found = {}
        for name, bands in self.cases[segment].items():
            chosen = [band for band in bands if first in (None, band.first)]
            tokens = np.sum([band.tokens for band in chosen], axis=0)
            hits = np.sum([getattr(band, column) for band in chosen], axis=0)
            found[name] = Score(
                values={ACCURACY.key: float(hits.sum() / tokens.sum())},
                stderr=None,
                tokens=int(tokens.sum()),
                bytes=None,
                document_tokens=tuple(tokens.tolist()),
                document_sums={ACCURACY.sums: tuple(hits.tolist())},
            )
        return found


Scorer = Callable[[MixedResult], Mapping[str, Score]]
"""Returns one score per domain of a result."""


def average_accuracy(scores: Mapping[str, Score]) -> float:
    """Return the mean accuracy over domains, in per cent."""
    return ACCURACY.scale * statistics.fmean(score.accuracy for score in scores.values())


def average_resamples(scores: Mapping[str, Score]) -> NDArray[np.float64]:
    """Return the mean accuracy over domains in all resamples of the documents, in per cent."""
    mean: NDArray[np.float64] = ACCURACY.scale * np.mean(list(resample(scores, ACCURACY).values()), axis=0)
    return mean


def compare(first: Mapping[str, Score], second: Mapping[str, Score]) -> Interval | None:
    """Return the interval over documents of a paired difference of mean accuracies; None with too few documents."""
    difference = average_accuracy(first) - average_accuracy(second)
    resamples = average_resamples(first) - average_resamples(second)
    documents = min(count_effective(score.document_tokens) for score in first.values())
    return interval_over_documents(difference, [resamples], documents)


def find_leader(results: Sequence[MixedResult], scorer: Scorer) -> MixedResult | None:
    """Return the result that is ahead of every other beyond noise; None if there is none or only one result."""
    scores = {result.id: scorer(result) for result in results}
    best, *others = sorted(results, key=lambda result: -average_accuracy(scores[result.id]))
    intervals = [compare(scores[best.id], scores[other.id]) for other in others]
    return best if others and all(found is not None and found.low > 0 for found in intervals) else None


def render_cells(results: Sequence[MixedResult], scorer: Scorer) -> dict[str, str]:
    """Return the mean accuracy of every result as text, by id, the leader's in bold."""
    leader = find_leader(results, scorer)
    cells = {result.id: f"{average_accuracy(scorer(result)):.2f}" for result in results}
    return cells | ({leader.id: STRONG.format(cells[leader.id])} if leader else {})


def describe_loss(result: MixedResult, segment: int) -> str:
    """Return what a run loses by the changes, with its standard error over documents, as text."""
    alone, mixed = result.score(segment, "alone"), result.score(segment, "hits")
    error = np.std(average_resamples(alone) - average_resamples(mixed), ddof=1)
    return f"{average_accuracy(alone) - average_accuracy(mixed):.2f} ± {error:.2f}"


def name_results(results: Sequence[MixedResult]) -> dict[str, dict[str, str]]:
    """Return the columns that name results: a text by id of the result, by heading."""
    return {
        "Method": {result.id: str(result.asked["method"]) for result in results},
        "Variant": {result.id: str(result.asked["variant"] or "–") for result in results},
        "Run": {result.id: f"{result.asked['run_name']}-{result.asked['run']}" for result in results},
    }


def make_frame(results: Sequence[MixedResult]) -> pd.DataFrame:
    """Return the main table as texts, with a row for every result and length of a segment."""
    frames = []
    for group in group_results(results):
        for segment in group[0].cases:
            columns = name_results(group)
            columns["Backbone"] = {result.id: str(result.asked["backbone"]) for result in group}
            columns["Split"] = {result.id: str(result.asked["split"]) for result in group}
            columns["Change every"] = {result.id: f"{segment} tokens" for result in group}
            columns["Alone"] = render_cells(group, partial(MixedResult.score, segment=segment, column="alone"))
            columns["Mixed"] = render_cells(group, partial(MixedResult.score, segment=segment, column="hits"))
            columns["Lost"] = {result.id: describe_loss(result, segment) for result in group}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames)


def make_distance_frame(results: Sequence[MixedResult], segment: int) -> pd.DataFrame:
    """Return the accuracy of comparable results by distance from the last change, as texts."""
    columns = name_results(results)
    for first in (band.first for band in next(iter(results[0].cases[segment].values()))):
        scorer = partial(MixedResult.score, segment=segment, column="hits", first=first)
        columns[name_band(first, segment)] = render_cells(results, scorer)
    return pd.DataFrame(columns)


def name_band(first: int, segment: int) -> str:
    """Return the distances of a band as text.

    >>> name_band(0, 32), name_band(1, 32), name_band(4, 32), name_band(16, 24)
    ('0', '1', '4–7', '16–23')
    """
    last = min(max(2 * first, first + 1), segment) - 1
    return f"{first}" if last == first else f"{first}–{last}"


def group_results(results: Sequence[MixedResult]) -> list[list[MixedResult]]:
    """Return the results in groups that may be compared, each in order of file name."""
    groups: dict[tuple[Any, ...], list[MixedResult]] = {}
    for result in sorted(results, key=lambda result: result.filename):
        groups.setdefault(result.conditions, []).append(result)
    return list(groups.values())


def list_lines(results: Sequence[MixedResult]) -> Iterator[dict[str, Any]]:
    """Return the lines of the CSV, in the form of the other tables: a run, a column and its value.

    Columns are LENGTH/alone, LENGTH/mixed, LENGTH/lost, and LENGTH/DISTANCE, and the same of every domain under
    LENGTH/DOMAIN/, in per cent and points.
    """
    for result in sorted(results, key=lambda result: result.filename):
        row = f"{result.asked['run_name']}-{result.asked['run']}"
        for segment, domains in result.cases.items():
            bands = [band.first for band in next(iter(domains.values()))]
            alone, mixed = result.score(segment, "alone"), result.score(segment, "hits")
            values = {"alone": alone, "mixed": mixed}
            values |= {str(first): result.score(segment, "hits", first) for first in bands}
            for column, scores in values.items():
                yield {"row": row, "column": f"{segment}/{column}", "mean": average_accuracy(scores)}
                for domain, score in scores.items():
                    mean = ACCURACY.scale * score.accuracy
                    yield {"row": row, "column": f"{segment}/{domain}/{column}", "mean": mean}
            lost = average_accuracy(alone) - average_accuracy(mixed)
            yield {"row": row, "column": f"{segment}/lost", "mean": lost}


def render_mixed(results: Sequence[MixedResult]) -> dict[str, str]:
    """Render results in Markdown and as CSV."""
    parts = ["# Rows in which the domain changes", INTRODUCTION, render_frame(make_frame(results))]
    for group in group_results(results):
        asked = group[0].asked
        for segment in group[0].cases:
            about = f"{escape_markdown(asked['backbone'])}, {asked['split']} split, a change every {segment} tokens"
            parts += [f"## By distance: {about}", render_frame(make_distance_frame(group, segment))]
    csv = pd.DataFrame(list_lines(results)).to_csv(index=False, float_format="%.6g")
    return {"md": "\n\n".join(parts) + "\n", "csv": csv}


def render_frame(frame: pd.DataFrame) -> str:
    """Render a table of texts in Markdown. Its cells are numbers, but for those that name a result."""
    names = [name for name in ("Method", "Variant", "Run", "Backbone") if name in frame]
    escaped = frame.assign(**{name: frame[name].map(escape_markdown) for name in names})
    return str(escaped.to_markdown(index=False, disable_numparse=True))


LONGEST_LABEL = 40
"""Maximum number of characters of a label in a figure."""


def label_results(results: Sequence[MixedResult]) -> dict[str, str]:
    """Return a label by id: the method, and the settings that not all results of the method have in common."""
    labels = {}
    for result in results:
        method = result.asked["method"]
        alike = [other.settings for other in results if other.asked["method"] == method]
        own = [text.removeprefix("method.") for text in result.settings if not all(text in each for each in alike)]
        labels[result.id] = shorten(", ".join([method, *own]), LONGEST_LABEL, placeholder=" …")
    return labels


def chart_mixed(results: Sequence[MixedResult]) -> Chart:
    """Return the chart of comparable results: accuracy over distance, with a panel for each length of a segment.

    The first token of a segment is left out: what comes before it says nothing of it.
    """
    labels = label_results(results)
    methods = {labels[result.id]: METHODS.get(result.asked["method"], OTHER) for result in results}
    styles = make_styles(methods, line=True)
    shown = [result for result in results if labels[result.id] in styles]
    panels = []
    for segment, domains in results[0].cases.items():
        firsts = [band.first for band in next(iter(domains.values())) if band.first]
        series = [
            Series(labels[result.id], trace(result, segment, firsts), styles[labels[result.id]]) for result in shown
        ]
        x = Axis("Tokens since the change", base=2, ticks=firsts)
        panels.append(Panel(f"A change every {segment} tokens", x, Axis("Accuracy, mean over domains (%)"), series))
    return Chart("Accuracy after a change of domain", panels, columns=3, size=(2.8, 2.6))


def trace(result: MixedResult, segment: int, firsts: Sequence[int]) -> list[Point]:
    """Return the mean accuracy at each band of distances as the points of a line."""
    return [Point(first, average_accuracy(result.score(segment, "hits", first))) for first in firsts]


def draw_mixed(results: Sequence[MixedResult], folder: Path) -> None:
    """Draw a figure for each group of comparable results into a folder."""
    for number, group in enumerate(group_results(results), 1):
        write_chart(chart_mixed(group), folder / f"mixed{f'-{number}' if number > 1 else ''}.png")


COLLECTION = Collection("mixed", "mixed result", MixedResult, SCHEMA, "mode eval --mixed", render_mixed, draw_mixed)
"""The results on mixed rows in a folder of results, and the files that are rendered from them."""
