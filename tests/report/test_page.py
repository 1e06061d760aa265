"""The page of a report: every number leads to its runs, nothing comes from elsewhere, and a real browser shows it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from cli.app import app
from mode.charts.chart import PALETTE
from mode.records.command import write_commands
from mode.records.record import Record, read_records
from mode.report.charts import chart_tradeoff
from mode.report.frames import make_frame
from mode.report.page import ASSETS, PAGE, write_page
from mode.tables.compile import TableData, compile_table
from mode.tables.pareto import compute_tradeoff
from mode.tables.table import load_table
from tests.conftest import World
from tests.report.test_report import ROWS, SCORES, made, stage, with_id
from tests.support.browser import Tab, browser, find
from tests.support.refusals import refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("composed_once")]
RESULTS = Path(__file__).parents[2] / "results"
EVIL = "<script>alert(1)</script>"
CURVE = [{"step": step, "loss": 3.0 - step / 10, "accuracy": step / 10, "seconds": 1.0} for step in (2, 4)]
VOID = ("meta", "link", "input", "br")


class Read(HTMLParser):
    """Reads a page: every element with its attributes, and the text of all that have an id."""

    def __init__(self, text: str) -> None:
        """Read a whole page."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append((tag, given.get("id", "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for _, name in self.open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data

    def all(self, name: str) -> list[str]:
        """Return every value of an attribute."""
        return [given[name] for _, given in self.elements if name in given]


@pytest.fixture(scope="module")
def conf(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration folder with a table of its own, of which one label tries to be a script."""
    folder = tmp_path_factory.mktemp("page") / "conf"
    shutil.copytree(shared_world.conf, folder)
    rows = [{**row, "label": EVIL} if row["name"] == "lora" else row for row in ROWS]
    table = {
        "title": f"Tiny & {EVIL}",
        "overrides": [text for text in shared_world.overrides if not text.startswith("paths.")],
        "rows": rows,
        "differences": [["mode-2x", "sft"]],
    }
    (folder / "table" / "tiny.yaml").write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(conf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of records: those of the table, and one that it has no use for."""
    folder = tmp_path_factory.mktemp("results")
    for (row, seed), scores in SCORES.items():
        needs = [foreign_stage(1).id] if row == "mode-2x" else []
        made(conf, "tiny", row, seed, scores, needs=needs, curve=CURVE).write(folder / "records")
    for number in (1, 2):
        foreign_stage(number).write(folder / "records")
    return folder


def foreign_stage(number: int) -> Record:
    """Return the record of a stage on a backbone with an evil name."""
    below = stage(number, 4, 1_000_000, 5.0)
    asked = {**below.asked, "backbone": {"name": EVIL}, "budget": {"policy": "paper"}}
    return with_id(dataclasses.replace(below, asked=asked, happened={**below.happened, "curve": CURVE}))


@pytest.fixture(scope="module")
def compiled(conf: Path, results: Path) -> TableData:
    return compile_table(load_table("tiny", conf), read_records(results), [], conf)


@pytest.fixture(scope="module")
def text(conf: Path, results: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out")
    return write_page([("tiny", [])], results, out, conf).read_text("utf-8")


@pytest.fixture(scope="module")
def read(text: str) -> Read:
    return Read(text)


# --- what is on it


def test_every_number_leads_to_the_runs_that_it_was_made_from(compiled: TableData, read: Read) -> None:
    cells = [given["href"] for tag, given in read.elements if tag == "a" and given.get("tabindex") == "-1"]
    table = make_frame(compiled)
    assert len(table) >= len(compiled.lines) > 0
    lines = zip([f"tiny--{line.name}" for line in compiled.lines], table.itertuples(index=False), strict=False)
    for anchor, (_, *texts) in lines:
        shown = sum(text not in ("", "–") for text in texts)
        assert cells.count(f"#{anchor}") >= shown > 0, anchor  # the table of costs leads there too
    for line in compiled.lines:
        told = read.texts[f"tiny--{line.name}"]
        assert [run for run in line.runs.values() if run not in told] == []
    ours, theirs = compiled.line("mode-2x").runs, compiled.line("sft").runs
    told = read.texts["tiny--mode-2x--sft"]
    assert all(told.count(run) == 1 for run in [*ours.values(), *theirs.values()])


def test_every_link_within_the_page_leads_somewhere_and_every_name_is_given_once(read: Read) -> None:
    names = read.all("id")
    assert len(set(names)) == len(names)
    inside = {link[1:] for link in read.all("href") if link.startswith("#")}
    assert inside - set(names) == set()
    assert read.open == []


def test_nothing_is_fetched_from_elsewhere(text: str, read: Read) -> None:
    assert read.all("src") == []
    assert [given["href"] for tag, given in read.elements if tag == "link"] == ["data:,"]
    assert not re.search(r"@import|url\(|https?://", text)


def test_what_records_and_tables_say_is_never_markup(text: str) -> None:
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1


def test_a_page_of_one_table_has_its_runs_and_their_stages_alone(results: Path, read: Read) -> None:
    shown = {name.removeprefix("run-") for name in read.all("id") if name.startswith("run-")}
    assert shown == {record.id for record in read_records(results)} - {foreign_stage(2).id}


def test_a_run_says_what_it_was_asked_and_where_its_record_is(
    conf: Path, results: Path, tmp_path: Path, compiled: TableData
) -> None:
    page = write_page([("tiny", [])], results, tmp_path / "deep" / "er", conf)
    told = Read(page.read_text("utf-8"))
    links = [link for link in told.all("href") if link.endswith(".json")]
    assert links
    for link in links:
        assert (page.parent / link).resolve().parent == results / "records"
        assert (page.parent / link).exists()
    run = told.texts[f"run-{compiled.line('sft').runs[1]}"]
    for part in ("train.steps=4", "targets=[py,sums]", "seed=1", "Trained parameters", "2,000,000", "weights"):
        assert part in run, part
    assert re.search(r"mode train baseline sft --domain py,sums .*seed=1 .*--conf", run)
    assert foreign_stage(1).id in told.texts[f"run-{compiled.line('mode-2x').runs[0]}"]


def test_a_row_without_a_run_says_what_would_make_it(read: Read) -> None:
    assert "mode reproduce tiny" in read.texts["tiny--mode-2x-frozen"]


def test_every_curve_is_drawn_and_no_document_is_in_the_page(text: str, results: Path) -> None:
    assert text.count("<title>Training of run") == len(read_records(results)) - 1
    assert "document_tokens" not in text


def test_the_same_records_give_the_same_page(conf: Path, results: Path, tmp_path: Path, text: str) -> None:
    place = tmp_path / "again"
    shutil.copytree(results, place)
    first = write_page([("tiny", [])], place, place, conf)
    assert first == place / PAGE
    content = first.read_bytes()
    assert write_page([("tiny", [])], place, place, conf).read_bytes() == content
    assert content.decode().count("<tr>") == text.count("<tr>") > 0


def test_without_a_record_the_command_that_makes_them_is_named(conf: Path, tmp_path: Path) -> None:
    with refused(str(tmp_path), "`mode reproduce tiny`"):
        write_page([("tiny", [])], tmp_path, tmp_path, conf)
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_stands_on_a_missing_record_says_which(conf: Path, results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "records", tmp_path / "records")
    next((tmp_path / "records").glob(f"*-{foreign_stage(1).id}.json")).unlink()
    with refused(f"run {foreign_stage(1).id}"):
        write_page([("tiny", [])], tmp_path, tmp_path, conf)


def test_the_command_line_writes_the_page_and_prints_where_it_is(conf: Path, results: Path) -> None:
    given = ["report", "tiny", "--html", "--conf", str(conf), f"paths.results={results}"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(results / PAGE)
    assert (results / PAGE).read_text("utf-8").startswith("<!doctype html>")


# --- the figure of accuracy, retention and cost


def test_the_front_is_what_no_other_row_beats(compiled: TableData) -> None:
    seen = compute_tradeoff(compiled)
    means = {
        place.line.name: (place.retention.mean, place.target.mean, place.line.cost["tokens"]) for place in seen.places
    }
    assert set(means) == {"backbone", "sft", "lora", "mode-2x"}
    assert seen.measure == "tokens"  # these records do not count operations
    for place in seen.places:
        kept, target, cost = means.pop(place.line.name)
        others = list(means.values())
        means[place.line.name] = (kept, target, cost)
        better = [o for o in others if o[0] >= kept and o[1] >= target and o[2] <= cost]
        assert place.best == (not better), place.line.name
    front = seen.front
    assert [kept for kept, _ in front] == sorted(kept for kept, _ in front)
    assert [target for _, target in front] == sorted((target for _, target in front), reverse=True)
    assert {place.line.name for place in seen.places if place.means[:2] in front} == {"mode-2x", "lora"}
    assert max(seen.size(place) for place in seen.places) == 1.0
    assert min(seen.size(place) for place in seen.places) == 0.0


def test_cost_is_in_operations_where_every_row_counts_them(conf: Path) -> None:
    rows = [made(conf, "tiny", row, 0, SCORES[row, 0], flops=flops) for row, flops in (("backbone", 0), ("sft", 4e12))]
    seen = compute_tradeoff(compile_table(load_table("tiny", conf), rows, [], conf))
    assert (seen.measure, [place.cost for place in seen.places]) == ("flops", [0.0, 4.0])


def test_rows_adapted_to_different_domains_are_no_rivals(compiled: TableData) -> None:
    seen = compute_tradeoff(dataclasses.replace(compiled, targets=()))
    assert (seen.front, {place.best for place in seen.places}) == ([], {True})
    assert "different domains" in seen.legend
    assert [bool(panel.front) for panel in chart_tradeoff(compiled).panels] == [True]


# --- colours


DEFICIENCIES = {  # Machado, Oliveira and Fernandes (2009), severity 1
    "normal": np.eye(3),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def linear(code: str) -> NDArray[np.float64]:
    """Return a colour's linear RGB."""
    given = np.array([int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(given <= 0.04045, given / 12.92, ((given + 0.055) / 1.055) ** 2.4)


def lab(colour: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return CIE L*a*b* of linear RGB."""
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    x, y, z = np.cbrt(to_xyz @ np.clip(colour, 0.0, 1.0) / np.array([0.9505, 1.0, 1.0888]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_the_page_and_from_each_other_for_every_eye(scheme: str) -> None:
    parts = (ASSETS / "page.css").read_text("utf-8").split("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--(\w+): (#\w{6})", parts[scheme == "dark"]))
    light = {name: float(np.array([0.2126, 0.7152, 0.0722]) @ linear(code)) + 0.05 for name, code in found.items()}
    series = [f"c{number}" for number in range(len(PALETTE))]
    for name, least in [*dict.fromkeys(series, 3.0).items(), ("ink", 7.0), ("soft", 4.5), ("link", 4.5)]:
        assert max(light[name], light["page"]) / min(light[name], light["page"]) >= least, name
    for kind, matrix in DEFICIENCIES.items():
        for one, other in itertools.combinations(series, 2):
            apart = float(np.linalg.norm(lab(matrix @ linear(found[one])) - lab(matrix @ linear(found[other]))))
            assert apart > 10.0, f"{one} and {other} look alike in {kind}"


# --- commands


def test_the_command_of_a_record_asks_for_the_same_run(world: World) -> None:
    places = [text for text in world.overrides if text.startswith("paths.") or text == "track=none"]
    for words in (
        ["train", "baseline", "lora", "method.rank=4", "train.batch.replay={prose: 0.25}"],
        ["train", "expert", "--domain", "py", "method.gate.top_k=1", "seed=3"],
        ["compose", "py", "sums", "--frozen", "budget=data", "train.steps=6"],
    ):
        given = [text for text in world.overrides if text.split("=")[0] not in {word.split("=")[0] for word in words}]
        if "--domain" in words or words[0] == "compose":
            given = [text for text in given if not text.startswith("targets=")]
        done = CliRunner().invoke(app, [*words, *given, "--conf", str(world.conf)])
        assert done.exit_code == 0, done.stderr
    records = read_records(world.root / "results")
    told = write_commands(records, world.conf)
    assert len(records) == 5  # two experts are stages of the last one
    for record in records:
        command, runs = told[record.id]
        assert runs, command
        again = CliRunner().invoke(app, [*shlex.split(command)[1:], *places])
        assert f"run {record.id} is done" in again.stdout, (command, again.stderr)


def test_what_cannot_be_asked_for_again_says_why(conf: Path) -> None:
    record = made(conf, "tiny", "sft", 0, SCORES["sft", 0])
    artefacts = Record(1, "a", {**record.asked, "artefacts": {"py": "digest"}}, record.happened, record.provenance)
    earlier = Record(1, "b", {**record.asked, "method": {**record.asked["method"], "old": 1}}, {}, record.provenance)
    told = write_commands([artefacts, earlier], conf)
    assert told["a"] == ("the run composed experts from folders, and the record does not name the folders", False)
    assert told["b"][1] is False


# --- in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page of published tables."""
    if find() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    tables: list[tuple[str, list[str]]] = [("table1", []), ("table1", ["budget=data"]), ("design", []), ("bench", [])]
    return write_page(tables, RESULTS, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def script(text: str) -> str:
    """Return statements as one expression."""
    return f"(() => {{ {text} }})()"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_its_screen_and_shows_its_figures(tab: Tab, page: Path, width: int, scheme: str) -> None:
    tab.open(page, width=width, scheme=scheme)
    assert tab.evaluate("innerWidth") == width
    everything = "for (const part of document.querySelectorAll('details')) part.open = true;"
    for state in ("", everything):
        tab.evaluate(script(state))
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.evaluate(script("for (const part of document.querySelectorAll('details')) part.open = false;"))
    window = tab.screenshot()
    assert window.shape == (900, width, 3)
    paper = window[5, width - 30]
    assert (paper.mean() < 0.2) == (scheme == "dark")
    ink = np.abs(window - paper).max(axis=2) > 0.3
    assert 0.005 < ink.mean() < 0.5
    figures = []
    for place in ("0", "figure.scrollWidth"):  # a narrow screen shows a figure by parts
        tab.evaluate(script(f"const figure = document.querySelector('#table1 .chart'); figure.scrollLeft = {place};"))
        figures.append(tab.screenshot("#table1 .chart"))
    for number in (0, 1, 2, 4):  # the table has marks for the backbone, SFT, LoRA and MoDE
        probe = (
            f"const probe = document.createElement('i'); probe.className = 'c{number}'; document.body.append(probe);"
        )
        code = tab.evaluate(script(f"{probe} return getComputedStyle(probe).color;"))
        colour = np.array([int(part) for part in re.findall(r"\d+", code)[:3]]) / 255
        assert any((np.abs(figure - colour).max(axis=2) < 0.05).sum() >= 20 for figure in figures), code
    words = "[...document.querySelectorAll('#table1 .chart text')].filter(part => part.checkVisibility())"
    assert tab.evaluate(f"{words}.length") > 10
    assert tab.evaluate(f"{words}.every(part => part.getBoundingClientRect().height >= 9)")
    assert tab.complaints == []
    assert tab.requests == [page.as_uri()]


def test_a_header_sorts_its_table_by_value_and_keeps_differences_apart(tab: Tab, page: Path) -> None:
    tab.open(page)
    first = "document.querySelector('#table1 table')"
    column = f"[...{first}.tBodies].map(body => [...body.rows].map(row => row.cells[1].textContent))"
    before = tab.evaluate(column)
    header = f"{first}.tHead.rows[0].cells[1]"
    tab.evaluate(f"{header}.querySelector('button').click()")
    assert tab.evaluate(f"{header}.getAttribute('aria-sort')") == "descending"
    after = tab.evaluate(column)
    for rows, was in zip(after, before, strict=True):
        assert sorted(rows) == sorted(was)
        values = [float(text.split()[0]) for text in rows if text != "–"]
        assert values == sorted(values, reverse=True)
        assert rows[len(values) :] == ["–"] * (len(rows) - len(values))
    assert after != before
    tab.evaluate(f"{header}.querySelector('button').focus()")
    tab.press("Enter")
    assert tab.evaluate(f"{header}.getAttribute('aria-sort')") == "ascending"
    for rows, was in zip(tab.evaluate(column), after, strict=True):
        numbers = [text for text in was if text != "–"]
        assert rows == numbers[::-1] + was[len(numbers) :]
    tab.press("Enter")
    assert tab.evaluate(column) == before
    assert tab.complaints == []


def test_dashes_and_blanks_are_sorted_last_and_thousands_as_numbers(tab: Tab, page: Path) -> None:
    tab.open(page)
    cost = "[...document.querySelectorAll('#table1 table')].find(table => table.caption.textContent === 'Cost')"
    places = f"[...{cost}.tHead.rows[0].cells].findIndex(cell => cell.textContent === 'Tokens/s')"
    column = f"[...{cost}.tBodies[0].rows].map(row => row.cells[{places}].textContent)"
    for sign in (-1, 1):
        tab.evaluate(f"{cost}.tHead.rows[0].cells[{places}].querySelector('button').click()")
        cells = tab.evaluate(column)
        numbers = [text for text in cells if text != "–"]
        assert len(numbers) > 1
        assert cells[len(numbers) :] == ["–"] * (len(cells) - len(numbers)) != []
        values = [int(text.replace(",", "")) for text in numbers]
        assert values == sorted(values, key=lambda value: sign * value)


def test_search_finds_runs_by_any_words(tab: Tab, page: Path) -> None:
    tab.open(page, width=390)
    records = read_records(RESULTS)
    shown = "[...document.querySelectorAll('details.run')].filter(run => run.checkVisibility()).map(run => run.id)"
    assert len(tab.evaluate(shown)) == len(records)
    tab.evaluate("document.getElementById('search').focus()")
    tab.type("baselines.lora.LoRA seed=1")
    wanted = [f"run-{r.id}" for r in records if "baselines.lora.LoRA" in json.dumps(r.asked) and r.seed == 1]
    assert tab.evaluate(shown) == wanted
    assert tab.evaluate("document.getElementById('found').textContent") == f"{len(wanted)} of {len(records)} runs"
    hidden = next(record.id for record in records if f"run-{record.id}" not in wanted)
    tab.evaluate(script(f"location.hash = '#run-{hidden}'; return new Promise(done => setTimeout(done, 100));"))
    assert tab.evaluate(f"document.getElementById('run-{hidden}').open")
    assert len(tab.evaluate(shown)) == len(records)
    assert tab.complaints == []


def test_a_number_leads_to_the_runs_of_its_row(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.evaluate("document.querySelector('#table1 tbody td a').click()")
    tab.evaluate("new Promise(done => setTimeout(done, 100))")
    assert tab.evaluate("document.querySelector(':target').id") == "table1--backbone"
    assert tab.evaluate("document.querySelector(':target').checkVisibility()")
    assert "seed 2" in tab.evaluate("document.querySelector(':target').innerText")
