"""Records survive the disk whole or are refused in one line, and an id is what was asked and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic.dataclasses import dataclass as settings

from mode.config import identity
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.groups import list_members
from mode.config.method import Anchor
from mode.config.names import OLD_NAMES
from mode.config.run import MethodSettings, Run
from mode.core.digests import digest_json
from mode.core.errors import ConfigError
from mode.records.collection import COLLECTIONS, find_collection
from mode.records.command import write_commands
from mode.records.measurement import DIGEST, format_json
from mode.records.provenance import describe_provenance
from mode.records.record import SCHEMA, Record, find_record, read_record, read_records
from mode.records.score import compute_error
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.refusals import refused

ACCURACY = sum(range(200)) / (300 * 200)


HAPPENED: dict[str, Any] = {
    "steps": 4,
    "tokens": 256,
    "seconds": 1.5,
    "parameters": {"total": 5, "trainable": 4, "added": 3},
    "split": "test",
    "scores": {
        "code": {"accuracy": ACCURACY, "document_tokens": [300] * 200, "document_hits": list(range(200))},
    },
    "curve": [{"step": 4, "loss": 2.5}],
    "lr": None,
}
"""What a record of the first version says of a run."""


def with_id(record: Record) -> Record:
    """Return a record with the id that follows from its content."""
    return dataclasses.replace(record, id=record.compute_id())


def record(seed: int = 3) -> Record:
    made = Record(
        schema=SCHEMA,
        id="",
        asked={
            "seed": seed,
            "targets": ["code", "math"],
            "backbone": {"name": "tiny"},
            "method": {"_target_": "mode.modular_method.MoDE", "lr": 1e-3},
            "train": {"sequence_length": 32},
            "evaluate": {"split": "test"},
        },
        happened=HAPPENED,
        provenance={"data": {"code": "ä"}, "backbone": "f", "precision": "fp32", "needs": []},
    )
    return with_id(made)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = record().write(tmp_path / "records")
    assert path.name == f"mode-code-math-s3-{record().id}.json"
    assert read_record(path) == record()
    assert read_records(tmp_path) == [record()]


def test_reading_fills_what_earlier_versions_did_not_write() -> None:
    read = record()
    assert (read.request.method_name, read.request.targets, read.request.examples) == ("MoDE", ("code", "math"), None)
    outcome, origin = read.outcome, read.origin
    assert (outcome.flops, outcome.forecast, outcome.kept_bytes, outcome.gates, outcome.branches) == (
        *(None, None, None),
        *({}, ()),
    )
    assert (outcome.parameters.added, outcome.curve[0].step, outcome.curve[0].values) == (3, 4, {"loss": 2.5})
    score = outcome.scores["code"]
    assert (score.accuracy, score.tokens, score.bytes, score.stderr) == (ACCURACY, 300 * 200, None, None)
    assert (origin.commit, origin.versions, origin.threads) == (None, {}, None)
    assert dataclasses.asdict(read) == dataclasses.asdict(record())  # what the file holds is not filled


def test_fields_of_this_version_win_over_what_reading_fills() -> None:
    happened = {**HAPPENED, "flops": 2.0, "kept_bytes": 7, "branches": ["a"], "gates": {"code": {"mean": [[1.0]]}}}
    happened["scores"] = {"code": {**HAPPENED["scores"]["code"], "tokens": 9, "bytes": 11, "stderr": 0.5}}
    asked = {**record().asked, "method": {"_target_": "x.Y", "anchor": {"share": 0.125}}}
    read = dataclasses.replace(record(), happened=happened, asked=asked)
    assert (read.outcome.flops, read.outcome.kept_bytes, read.outcome.branches) == (2.0, 7, ("a",))
    assert (read.outcome.gates["code"].mean, read.outcome.gates["code"].active) == ([[1.0]], None)
    score = read.outcome.scores["code"]
    assert (score.tokens, score.bytes, score.stderr) == (9, 11, 0.5)
    assert read.request.anchor == {"share": 0.125, "weight": Anchor.weight}


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ({"num_blocks": 1, "start": "experts"}, ("backbone", "code", "math")),
        ({"num_blocks": 1, "start": "fresh"}, ("backbone", "expert 1", "expert 2")),
        ({}, ("expert 1", "expert 2", "expert 3")),
    ],
)
def test_branches_that_a_record_does_not_name_are_named_by_its_method(
    method: dict[str, Any], names: tuple[str, ...]
) -> None:
    asked = {**record().asked, "method": {"_target_": "x.Y", **method}}
    happened = {**HAPPENED, "gates": {"code": {"mean": [[0.5, 0.25, 0.25]]}}}
    assert dataclasses.replace(record(), asked=asked, happened=happened).outcome.branches == names


def test_every_published_record_is_read_and_written_again_to_the_byte(tmp_path: Path) -> None:
    paths = sorted((Path(__file__).parents[2] / "results" / "records").glob("*.json"))
    assert paths
    for path in paths[::10]:
        read = read_record(path)
        assert read.outcome.scores
        written = json.loads(read.write(tmp_path).read_text("utf-8"))
        if DIGEST not in json.loads(path.read_text("utf-8")):
            written.pop(DIGEST)  # earlier versions did not write it
        assert format_json(written).encode() == path.read_bytes()


@pytest.mark.parametrize("part", ["steps", "parameters", "scores", "curve", "split"])
def test_a_record_without_a_part_is_refused_in_one_line(tmp_path: Path, part: str) -> None:
    happened = {name: value for name, value in HAPPENED.items() if name != part}
    path = tmp_path / "x.json"
    path.write_text(damage(dataclasses.asdict(record()), happened=happened), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"not a record that mode wrote .*{part}"):
        read_record(path)


def test_a_list_of_numbers_stays_on_one_line(tmp_path: Path) -> None:
    lines = record().write(tmp_path).read_text("utf-8").splitlines()
    assert len(lines) < 60
    assert any("0, 1, 2, 3" in line and "198, 199" in line for line in lines)


def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record().write(tmp_path)

    def crash(source: Path, target: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        dataclasses.replace(record(), happened={**HAPPENED, "scores": {}}).write(tmp_path)
    assert read_record(path) == record()
    assert list(tmp_path.glob("*.json")) == [path]


def test_what_a_crash_left_half_written_is_not_read(tmp_path: Path) -> None:
    path = record().write(tmp_path / "records")
    (path.parent / f".{path.name}.77.partial").write_text('{"schema"', encoding="utf-8")
    assert read_records(tmp_path) == [record()]


def damage(plain: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**plain, **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a record that mode wrote"),
        ("[1, 2]", "not a record that mode wrote"),
        ("[" * 100_000, "not a record that mode wrote (nested too deeply)"),
        ('{"asked":' * 100_000, "not a record that mode wrote (nested too deeply)"),
        ('"text"', "not a record that mode wrote"),
        ('{"title": "something else"}', "not a record that mode wrote"),
        (damage(dataclasses.asdict(record()), asked=None), "not a record that mode wrote"),
        (damage(dataclasses.asdict(record()), id=7), "not a record that mode wrote"),
        (
            damage(dataclasses.asdict(record()), happened={**HAPPENED, "gates": {"code": {"mean": []}}}),
            "not a record that mode wrote",
        ),
        (damage(dataclasses.asdict(record()), schema=99), "record schema 99; this version reads schema 1"),
        ('{"schema": 2, "run": "x", "laid": "out otherwise"}', "record schema 2; this version reads schema 1"),
    ],
)
def test_a_foreign_file_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "records" / "x.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_records(tmp_path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("asked.seed", 4, "changed since it was written"),
        ("asked.method.lr", 2e-3, "changed since it was written"),
        ("asked.evaluate.split", "validation", "test"),
        ("provenance.data.code", "b", "changed since it was written"),
        ("provenance.backbone", "g", "changed since it was written"),
        ("provenance.data", {}, "data of none"),
        ("happened.split", "validation", "validation"),
        ("happened.scores", {}, "no domain"),
        ("happened.scores.math", HAPPENED["scores"]["code"], "math"),
        ("happened.scores.code.accuracy", 0.99, "accuracy is 0.99"),
        ("happened.scores.code.accuracy", math.nan, "accuracy is nan"),
        ("happened.scores.code.loss", math.inf, "loss is inf"),
        ("happened.scores.code.loss", 1.5, "document_nll"),
        ("happened.scores.code.bits_per_byte", 3.0, "document_nll"),
        ("happened.scores.code.tokens", 59_999, "tokens is 59999"),
        ("happened.scores.code.stderr", 0.5, "stderr is 0.5"),
        ("happened.scores.code.document_hits", list(range(1, 201)), "document_hits"),
        ("happened.scores.code.document_hits", [sum(range(200)), *[0] * 199], "document_hits"),
        ("happened.scores.code.document_hits", list(range(199)), "document_hits"),
        ("happened.scores.code.document_tokens", [], "tokens"),
        ("id", "0123456789ab", "0123456789ab"),
        ("happened.seconds", 0.5, "digest"),
        ("happened.parameters.added", 4, "digest"),
        ("provenance.precision", "bf16", "digest"),
        ("digest", "0" * 64, "digest"),
        ("digest", 7, "digest"),
    ],
)
def test_an_edited_record_is_refused(tmp_path: Path, place: str, value: object, named: str) -> None:
    score = {
        **HAPPENED["scores"]["code"],
        **{"tokens": 60_000, "bytes": 120_000, "stderr": compute_error(range(200), [300] * 200)},
        **{"loss": 2.0, "bits_per_byte": 1.0 / math.log(2), "document_nll": [600.0] * 200},
    }
    path = dataclasses.replace(record(), happened={**HAPPENED, "scores": {"code": score}}).write(tmp_path)
    assert read_record(path).outcome.scores["code"].loss == 2.0
    plain = node = json.loads(path.read_text("utf-8"))
    *parts, last = place.split(".")
    for part in parts:
        node = node[part]
    assert node.get(last) != value
    node[last] = value
    path.write_text(json.dumps(plain), encoding="utf-8")
    with refused(str(path), named):
        read_record(path)


def test_a_record_without_a_digest_is_of_an_earlier_version_and_read(tmp_path: Path) -> None:
    path = record().write(tmp_path)
    plain = json.loads(path.read_text("utf-8"))
    assert plain.pop(DIGEST) == digest_json(plain)
    path.write_text(format_json(plain), encoding="utf-8")
    assert read_record(path) == record()


def test_sums_that_were_rounded_agree_with_their_metric(tmp_path: Path) -> None:
    """Per-document sums are rounded to three decimals, and the metric is not."""
    nll = [700.0 / 3.0] * 200
    score = {**HAPPENED["scores"]["code"], "loss": sum(nll) / 60_000, "document_nll": [round(each, 3) for each in nll]}
    path = dataclasses.replace(record(), happened={**HAPPENED, "scores": {"code": score}}).write(tmp_path)
    assert read_record(path).outcome.scores["code"].loss == score["loss"]


def test_two_records_under_each_others_names_are_refused(tmp_path: Path) -> None:
    first, second = (record(seed).write(tmp_path / "records") for seed in (1, 2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    for path in (first, second):
        with refused(str(path), (second if path == first else first).name):
            read_record(path)
    with refused(str(first)):
        read_records(tmp_path)
    with refused(str(second)):
        find_record(tmp_path, record(2).id)


@pytest.mark.parametrize("part", ["asked", "happened", "provenance"])
@pytest.mark.parametrize("empty", [{}, [], None, ""])
def test_a_record_with_an_empty_part_is_refused(tmp_path: Path, part: str, empty: object) -> None:
    path = record().write(tmp_path)
    path.write_text(damage(json.loads(path.read_text("utf-8")), **{part: empty}), encoding="utf-8")
    with refused(str(path)):
        read_record(path)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        *[("steps", value) for value in ({}, [], None, "4", True)],
        *[("parameters", value) for value in ({}, [], {"total": {}, "trainable": 4, "added": 3})],
        *[("curve", value) for value in (1, [[]], [{}], [{"step": 4, "loss": {}}], [{"step": 4, "loss": None}])],
        *[("gates", value) for value in ({"code": []}, {"code": {}}, {"code": {"mean": [["1"]]}})],
        *[("contamination", value) for value in ({"code": []}, {"code": {"math": {}}})],
    ],
)
def test_a_record_with_an_empty_or_wrong_value_is_refused(tmp_path: Path, place: str, wrong: object) -> None:
    path = record().write(tmp_path)
    path.write_text(damage(dataclasses.asdict(record()), happened={**HAPPENED, place: wrong}), encoding="utf-8")
    with refused(str(path)):
        read_record(path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_every_committed_measurement_has_the_id_of_its_content_and_no_other_name(tmp_path: Path, name: str) -> None:
    collection = find_collection(name)
    paths = sorted((Path(__file__).parents[2] / "results" / name).glob("*.json"))
    assert paths
    for path in paths:
        assert collection.read_file(path).compute_id() in path.read_text("utf-8")
    copy = tmp_path / f"copy-of-{paths[0].name}"
    copy.write_bytes(paths[0].read_bytes())
    with refused(str(copy), paths[0].name):
        collection.read_file(copy)
    plain = json.loads(paths[0].read_text("utf-8"))
    plain["asked"]["backbone"] = "another"
    edited = tmp_path / paths[0].name
    edited.write_text(json.dumps(plain), encoding="utf-8")
    with refused(str(edited), plain["id"]):
        collection.read_file(edited)


def test_a_truncated_record_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    path = record().write(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip()), 37):
        path.write_bytes(whole[:length])
        with refused(str(path)):
            read_record(path)
    path.write_bytes(b"\xff" + whole)
    with refused(str(path)):
        read_record(path)
    with refused("none.json"):
        read_record(tmp_path / "none.json")


def test_a_record_is_found_by_its_id_alone(tmp_path: Path) -> None:
    for seed in (1, 2):
        record(seed).write(tmp_path / "records")
    found = find_record(tmp_path, record(2).id)
    assert found == record(2)
    assert find_record(tmp_path, record(2).id[1:]) is None
    assert find_record(tmp_path / "none", record(2).id) is None


def test_only_data_backbone_and_precision_make_the_conditions() -> None:
    other = dataclasses.replace(record(9), happened={**HAPPENED, "scores": {}})
    assert other.conditions == record().conditions
    for part in ({"backbone": "g"}, {"data": {"code": "other"}}, {"precision": "bf16"}):
        changed = dataclasses.replace(record(), provenance={**record().provenance, **part})
        assert changed.conditions != record().conditions


def test_provenance_says_where_a_run_was_made() -> None:
    found = describe_provenance(
        data={"py": "f"},
        backbone="b",
        pretraining={},
        needs=["n"],
        device="cpu",
        precision="fp32",
        threads=3,
        layout="ddp",
    )
    assert (found["data"], found["backbone"], found["needs"]) == ({"py": "f"}, "b", ["n"])
    assert found["versions"]["torch"]
    assert found["machine"]["device"] == "cpu"
    assert found["threads"] == 3
    assert json.loads(json.dumps(found)) == found


# --- identity


@pytest.fixture(scope="module")
def run(shared_world: World) -> Run:
    return compose([*shared_world.overrides, "method=lora"], shared_world.conf)


def changed(run: Run, **changes: Any) -> Run:
    """Change settings of a run, named `group__setting` or `setting`."""
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        run = replace_settings(
            run, **({group: replace_settings(getattr(run, group), **{field: value})} if group else {name: value})
        )
    return run


def test_an_id_ignores_paths_and_tracking(run: Run, tmp_path: Path) -> None:
    elsewhere = changed(run, paths__runs=str(tmp_path), paths__results=str(tmp_path), track__mode="offline")
    named = changed(elsewhere, track__group="g", track__name="row", track__project="p")
    assert prepare_run(named).id == prepare_run(run).id
    moved = changed(run, paths__cache=str(tmp_path / "cache"))
    assert prepare_run(moved).id == prepare_run(run).id


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"method__lr": 0.5},
        {"train__lr": 0.5},
        {"train__steps": 6},
        {"method__rank": 2},
        {"method__rank_stabilized": True},
        {"targets": ("py",)},
        {"targets": ("sums", "py")},
        {"evaluate__split": "validation"},
    ],
    ids=str,
)
def test_an_id_changes_with_what_is_asked(run: Run, changes: dict[str, Any]) -> None:
    assert prepare_run(changed(run, **changes)).id != prepare_run(run).id


def test_an_id_changes_with_the_first_token_of_documents_only_if_there_is_one(run: Run) -> None:
    assert run.backbone.bos == "auto"
    assert prepare_run(changed(run, backbone__bos=False)).id == prepare_run(run).id
    begun = prepare_run(changed(run, backbone__bos=True))
    assert begun.asked == prepare_run(run).asked
    assert begun.id != prepare_run(run).id


def test_an_id_changes_with_the_data_and_the_weights_but_not_with_a_domains_words(run: Run) -> None:
    this = prepare_run(run)
    fingerprints = this.fingerprints | {"backbone": this.backbone}
    assert identity.digest_run(this.asked, fingerprints) == this.id
    for name in fingerprints:
        assert identity.digest_run(this.asked, {**fingerprints, name: "other"}) != this.id
    assert "licence" not in json.dumps(this.asked)
    assert run.paths.cache not in json.dumps(this.asked)


@settings(frozen=True, kw_only=True, config=STRICT)
class Before(MethodSettings):
    """A method's settings."""

    rank: int


@settings(frozen=True, kw_only=True, config=STRICT)
class After(Before):
    """The same settings in a later version, with one more."""

    rank: int
    fancy: bool = False


def test_a_setting_added_later_and_left_at_its_default_changes_no_id(run: Run) -> None:
    def asked(method: MethodSettings) -> dict[str, Any]:
        plain = identity.describe_run(replace_settings(run, method=method))
        plain["method"].pop("_target_")
        return plain

    assert asked(After(lr=0.1, rank=2)) == asked(Before(lr=0.1, rank=2))
    assert asked(After(lr=0.1, rank=2, fancy=False)) == asked(Before(lr=0.1, rank=2))
    assert asked(After(lr=0.1, rank=2, fancy=True)) != asked(Before(lr=0.1, rank=2))


def test_a_setting_without_a_default_always_counts(run: Run) -> None:
    plain = identity.describe_run(run)
    assert plain["train"]["lr"] is None
    assert plain["method"]["rank"] == 16
    assert "rank_stabilized" not in plain["method"]


def test_what_was_asked_is_equal_after_the_disk(run: Run, world: World) -> None:
    composed = compose([*world.overrides, "method=mode"], world.conf)
    for plain in map(identity.describe_run, (run, composed, composed.method.needs(composed)[0])):  # type: ignore[attr-defined]
        assert json.loads(json.dumps(plain)) == plain


def test_text_that_differs_from_the_pretraining_is_named() -> None:
    known = {"code": "older", "math": "m"}
    seen = dataclasses.replace(record(), provenance={**record().provenance, "data": {"code": "ä", "math": "m"}})
    assert seen.overlap == ()
    assert dataclasses.replace(seen, provenance={**seen.provenance, "pretraining_data": known}).overlap == ("code",)


COMMITTED = sorted(
    path
    for path in (Path(__file__).parents[2] / "results").rglob("*.json")
    if path.parent.name == "records" and "partial" not in path.name
)


def test_the_id_of_every_committed_record_follows_from_its_content() -> None:
    assert COMMITTED
    for path in COMMITTED:
        found = read_record(path)
        data = {**found.provenance["data"], "backbone": found.provenance["backbone"]}
        assert identity.digest_run(found.asked, data) == found.id, path
        assert found.filename == path.name


@pytest.mark.slow
def test_every_published_run_has_a_command_that_asks_for_it() -> None:
    records = read_records(Path(__file__).parents[2] / "results")
    commands = write_commands(records)
    assert records
    assert [(found, commands[found.id]) for found in records if not commands[found.id][1]] == []
    assert len({command for command, _ in commands.values()}) == len(commands)
    for name in OLD_NAMES:
        assert not any(f"{name}=" in command for command, _ in commands.values())


def test_every_method_has_a_name_of_its_own_in_records() -> None:
    classes = {type(compose([f"method={name}"]).method) for name in list_members("method")}
    names = [cls.recorded_name() for cls in classes]
    assert all("recorded_as" in vars(cls) for cls in classes)
    assert len(set(names)) == len(names)
    recorded = {read_record(path).asked["method"]["_target_"] for path in COMMITTED}
    assert recorded <= set(names)


def test_a_method_of_another_place_is_found_by_its_recorded_name() -> None:
    @settings(frozen=True, kw_only=True, config=STRICT)
    class Moved(Before):
        """The same method in another module."""

        recorded_as: ClassVar[str] = "older.place.Before"

    assert Moved.recorded_name() == "older.place.Before"
    assert After.recorded_name() == f"{__name__}.After"  # a subclass is a method of its own


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "kind"), [("two-processes", "ddp"), ("side-by-side", "mpmd")])
def test_published_runs_of_two_processes_are_those_of_one_within_noise(folder: str, kind: str) -> None:
    results = Path(__file__).parents[2] / "results"
    found, published = read_records(results / folder), read_records(results)
    assert found
    for record in found:
        assert record.provenance["layout"] == {"kind": kind, "processes": 2}
        (alone,) = [each for each in published if each.id == record.id]
        assert "layout" not in alone.provenance
        for domain, score in record.happened["scores"].items():
            assert abs(score["accuracy"] - alone.happened["scores"][domain]["accuracy"]) < 5e-4  # seeds differ by 2e-3


@pytest.mark.parametrize("name", ["../../x", "<img src=x>", "true", "a|b"])
def test_a_domain_of_a_record_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    path = record().write(tmp_path)
    whole = json.loads(path.read_text("utf-8"))
    for part in ("asked", "provenance"):
        changed = json.loads(json.dumps(whole))
        changed[part] |= {"targets": [name]} if part == "asked" else {"data": {name: "0123"}}
        path.write_text(json.dumps(changed), "utf-8")
        with refused(str(path), "name" if name != "true" else "true"):
            read_record(path)
