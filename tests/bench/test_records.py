"""Benchmarks: what is timed, in what order, what becomes of it; and the exchange of an expert that they measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.bench.ratios import compute_ratio
from mode.bench.records import COLLECTION, describe_conditions, make_cells, render_section
from mode.bench.run import describe_benchmark, run_suite
from mode.bench.suites.inference import build_modular
from mode.bench.timing import Case, interleave
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.methods.mode import MoDE
from mode.modular.edit import replace_experts, swap_expert
from mode.modular.experts import extract_expert_state
from mode.modular.model import MoDEForCausalLM
from mode.report.page import make_bench_section
from tests.artefacts.test_write import logits
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.refusals import refused


def fresh(world: World, *experts: str, seed: int = 0, **settings: int) -> MoDEForCausalLM:
    """Build a model with random experts and gates."""
    run = compose([*world.overrides, "method=mode"], world.conf)
    assert isinstance(run.method, MoDE)
    torch.manual_seed(seed)
    model = build_modular(run, replace_settings(run.method, **settings), list(experts)).eval()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.slow
def test_the_order_is_reversed_from_round_to_round_and_the_first_round_does_not_count() -> None:
    seen: list[str] = []
    cases = [Case("job", name, lambda name=name: seen.append(name)) for name in "abc"]
    finished: list[int] = []
    seconds = interleave(cases, 2, finished.append)
    assert "".join(seen) == "cba" + "abc" + "cba"
    assert [len(times) for times in seconds] == [2, 2, 2]
    assert finished == [0, 1, 2]


def test_ratios_are_paired_by_round() -> None:
    # The machine is ten times slower in the second round; the ratio is not.
    assert compute_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).high == 2.0
    assert compute_ratio([3.0], [1.5]).low == 2.0


@pytest.mark.parametrize(
    ("suite", "settings", "told"),
    [
        (
            "step",
            ["train.batch.intra_document_masking=true"],
            "train.batch.intra_document_masking=true is not supported by mode bench: the rows",
        ),
        (
            "loops",
            ["train.kernels.compile=auto"],
            "train.kernels.compile=auto is not supported by mode bench: choose true or false",
        ),
        ("scale", ["train.memory.activation_checkpointing=auto", "train.memory.budget_gb=1"], "choose which layers"),
        ("startup", [], "suite `startup` supports only backbone=tiny, not pico"),
        ("sharding", ["method.head_rank=2"], "suite `sharding` goes with method.head_rank=0"),
        ("sharding", ["method.gate.reads=output"], "and method.gate.reads=input"),
    ],
)
def test_what_a_suite_does_not_measure_is_refused(world: World, suite: str, settings: list[str], told: str) -> None:
    result = call(world, "bench", suite, *settings)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


def test_options_are_part_of_what_was_measured(world: World) -> None:
    def asked(suite: str, *settings: str) -> dict[str, Any]:
        run: Any = compose([*world.overrides, "method=mode", *settings], world.conf)
        return describe_benchmark(suite, run, run.method)

    given = [
        "train.memory.activation_checkpointing=all",
        "train.batch.gradient_accumulation_steps=2",
        "method.head_rank=2",
    ]
    everywhere = {"train.accumulate": 2, "method.head_rank": 2}
    assert "options" not in asked("step")
    assert asked("step", *given) == asked("step") | {"options": everywhere | {"train.activation_checkpointing": "all"}}
    assert asked("options", *given)["options"] == everywhere  # which itself varies what is formed again
    assert asked("eval", "evaluate.batch_size=3") == asked("eval") | {"rows": [3, asked("eval")["rows"][1]]}
    committed = COLLECTION.read(Path(__file__).parents[2] / "results")
    published = next(each for each in committed if each.asked["suite"] == "step")
    told = describe_conditions(
        replace_settings(published, asked=published.asked | {"options": {"train.compile": True}})
    )
    assert "tokens; train.kernels.compile=True; cpu" in told


@pytest.mark.slow
def test_a_swapped_expert_is_as_if_it_had_been_composed(world: World) -> None:
    model, other = fresh(world, "one", "two"), fresh(world, "three", seed=1)
    kept, comes = extract_expert_state(model, 0), extract_expert_state(other, 0)
    expected = logits(replace_experts(fresh(world, "any", seed=2), {"one": kept, "three": comes}))
    before = logits(model)
    swap_expert(model, "two", "three", comes)
    assert model.config.experts == ["one", "three"]
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (logits(model) - before).abs().max() > 1e-3
    swap_expert(model, "three", "two", extract_expert_state(fresh(world, "one", "two"), 1))
    assert (logits(model) - before).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leaves", "comes", "settings", "named"),
    [
        ("tow", "three", {}, ("tow", "one, two", "two?")),
        ("two", "one", {}, ("one",)),
        ("two", "three", {"expert_layers": 2}, ("layers.1.", "nothing is expected")),
        ("two", "three", {"num_blocks": 2}, ("is nothing",)),
    ],
)
def test_an_expert_that_does_not_fit_leaves_the_model_as_it_was(
    world: World, leaves: str, comes: str, settings: dict[str, int], named: tuple[str, ...]
) -> None:
    model = fresh(world, "one", "two")
    before = logits(model)
    with refused(*named):
        swap_expert(model, leaves, comes, extract_expert_state(fresh(world, comes, seed=1, **settings), 0))
    assert torch.equal(logits(model), before)
    assert model.config.experts == ["one", "two"]


@pytest.mark.slow
def test_the_inference_suite_leaves_a_record_that_the_report_follows_from(world: World) -> None:
    results = world.root / "results"
    result = call(world, "bench", "inference", "--rounds", "2")
    assert result.exit_code == 0, result.output
    (benchmark,) = COLLECTION.read(results)
    assert render_section(benchmark) in result.stdout
    sizes = benchmark.happened["bytes"]
    backbone, alone = sizes["backbone"], sizes["one expert"]
    for number, name in enumerate(("backbone + 1 expert", "backbone + 2 experts"), 1):
        assert sizes[name] == pytest.approx(backbone + number * alone, rel=0.1)  # headers of files
    jobs = [(case["job"], case["variant"]) for case in benchmark.happened["cases"]]
    assert len(jobs) == len(set(jobs)) == 12
    assert all(len(case["seconds"]) == 2 for case in benchmark.happened["cases"])
    assert COLLECTION.stale(results) == [results / "bench.md"]
    assert call(world, "report", "bench").exit_code == 0
    assert COLLECTION.stale(results) == []
    (path,) = (results / "bench").glob("*.json")
    plain = json.loads(path.read_text("utf-8"))
    plain["happened"]["cases"][1]["seconds"] = [99.0, 99.0]
    replace(benchmark, happened=plain["happened"]).write(path.parent)
    assert COLLECTION.stale(results) == [results / "bench.md"]
    path.write_text(json.dumps(plain), "utf-8")
    with refused(str(path), "digest"):
        COLLECTION.read(results)


def test_every_published_benchmark_is_a_whole_table_of_the_page() -> None:
    """Some have columns of usage, some sizes, and some both; no browser is needed to see that rows fit heads."""
    published = COLLECTION.read(Path(__file__).parents[2] / "results")
    shapes = {(len(heads), len(row)) for heads, *rows in map(make_cells, published) for row in rows}
    assert shapes == {(5, 5), (8, 8)}
    assert len([make_bench_section(benchmark, "results") for benchmark in published]) == len(published) >= 7


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_file_that_is_no_benchmark_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "loss.json").write_text(text, "utf-8")
    with refused("loss.json"):
        COLLECTION.read(tmp_path)


def test_a_place_where_nothing_can_be_written_is_told_before_anything_is_measured(world: World) -> None:
    (world.root / "results").write_text("a file", "utf-8")
    result = call(world, "bench", "edge")  # the old name of a suite
    assert result.exit_code == 2
    assert "results" in result.output
    assert "warmed up" not in result.output


def test_a_benchmark_needs_experts(world: World) -> None:
    run = compose([*world.overrides, "method=sft"], world.conf)
    with refused("method=mode"):
        run_suite("inference", run, 1)
