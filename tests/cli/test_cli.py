"""The command line: every mistake is answered in one line, every command does what its help says, nothing is heavy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cli.app import app
from cli.options import complete
from mode.config.check import flatten
from mode.config.compose import compose
from mode.config.groups import conf_dirs, list_members, read_group
from mode.core.tensors import load_tensors, save_tensors
from mode.methods.base import FAMILIES
from mode.records.record import Record, read_records
from mode.runs.execute import WEIGHTS
from tests.conftest import DOMAINS, World
from tests.support.refusals import check_message, check_refused

HEAVY = ("torch", "transformers", "hydra", "omegaconf", "wandb", "datasets", "pandas", "rich", "pydantic", "numpy")
LORA = ("train", "baseline", "lora")
TRAIN_FLAGS = ["--again", "--conf", "--domain", "--print-config", "--sweep"]
FLAGS = {
    "bench": ["--conf", "--rounds"],
    "compose": ["--again", "--conf", "--frozen", "--print-config", "--sweep", "--uninitialized"],
    "data prepare": ["--conf", "--domain"],
    "data show": ["--conf", "--domain"],
    "eval": ["--again", "--conf", "--downstream", "--limit", "--metric", "--mixed", "--retention", "--task"],
    "generate": ["--conf", "--gates", "--html", "--layout", "--max-tokens", "--seed", "--temperature", "--top-p"],
    "analyze gates": ["--conf", "--html", "--split", "--tokens"],
    "expert add": ["--conf", "--embed"],
    "expert remove": ["--conf", "--embed"],
    "expert show": ["--conf"],
    "export": ["--conf", "--experts", "--merge", "--precision"],
    "launch": ["--nproc"],
    "plan": ["--calibrate", "--conf", "--curves", "--device", "--devices", "--link"],
    "prune": ["--by", "--conf", "--ratio"],
    "report": ["--check", "--conf", "--html", "--metric", "--wandb"],
    "reproduce": ["--conf", "--jobs", "--launcher", "--row", "--within"],
    "show backbones": ["--conf"],
    "show budget": ["--conf"],
    "show config": ["--conf", "--domain"],
    "show domains": ["--conf"],
    "show methods": ["--conf", "--describe"],
    "show runs": ["--conf"],
    "show tables": ["--conf"],
    "sync": ["--conf"],
    "train backbone": ["--again", "--conf", "--print-config"],
    "train baseline": TRAIN_FLAGS,
    "train expert": TRAIN_FLAGS,
}
COMMANDS = [
    "compose",
    "launch",
    "eval",
    "report",
    "reproduce",
    "plan",
    "bench",
    "sync",
    "generate",
    "export",
    "prune",
    "train",
    "expert",
    "analyze",
    "show",
    "data",
]

MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown setting": ((*LORA, "train.lrr=1"), ("train.lrr", "train.lr?")),
    "unknown method": (("train", "baseline", "lroa"), ("method=lroa", "lora?")),
    "unknown method to show": (("show", "methods", "--describe", "lroa"), ("method=lroa", "lora?")),
    "backbone of the methods": (("show", "methods", "backbone=pic"), ("backbone=pic", "pico?")),
    "one method of all": (("show", "methods", "method=lora"), ("method=lora", "--describe lora")),
    "setting of one method of all": (("show", "methods", "method.rank=4"), ("method.rank=4", "--describe")),
    "unknown method setting": ((*LORA, "method.rnk=4"), ("method.rnk", "method.rank?")),
    "unknown setting with plus": ((*LORA, "+method.rnk=4"), ("method.rnk", "method.rank?")),
    "out of bounds": ((*LORA, "train.lr=-1"), ("train.lr=-1",)),
    "wrong type": ((*LORA, "seed=a"), ("seed=a", "integer")),
    "comma without sweep": ((*LORA, "train.lr=1e-4,2e-4"), ("train.lr=1e-4,2e-4", "--sweep", "[1e-4,2e-4]")),
    "foreign target": (
        (*LORA, "method._target_=os.system"),
        ("method._target_=os.system", "mode.", "baselines.", "mode.methods"),
    ),
    "two kinds of domains": ((*LORA, "-d", "py", "targets=[sums]"), ("py", "targets=[sums]")),
    "domain as an override": ((*LORA, "-d", "py", "domain=sums"), ("py", "domain=sums")),
    "domain without flag": ((*LORA, "domain=sums"), ("domain=sums", "targets=[sums]")),
    "no domain named": ((*LORA, "-d", ","), ("--domain ,",)),
    "experiment of another method": (
        ("train", "expert", "-d", "py", "experiment=of_lora"),
        ("method=mode", "experiment=of_lora", "method=lora"),
    ),
    "override of another method": ((*LORA, "method=sft"), ("method=lora", "method=sft")),
    "backbone by another method": (("train", "backbone", "method=sft"), ("method=pretrain", "method=sft")),
    "unknown domain": ((*LORA, "--domain", "cod"), ("domain cod", "code?")),
    "unknown domain to show": (("data", "show", "-d", "cod"), ("domain cod", "code?")),
    "domain named twice": ((*LORA, "-d", "py,py"), ("py", "twice")),
    "unknown table": (("reproduce", "tabel1"), ("table tabel1", "table1?")),
    "unknown suite": (
        ("bench", "infer"),
        ("infer: ", "branches, data, eval", "inference?"),
    ),
    "unknown table to report": (("report", "tabel1"), ("table tabel1", "table1?")),
    "page and check": (("report", "--html", "--check"), ("--check", "--html")),
    "page and log": (("report", "--html", "--wandb"), ("--wandb", "--html")),
    "seeds not numbers": (("reproduce", "table1", "seeds=[a]"), ("seeds=[a]", "seeds=[0,1,2]")),
    "seeds equal": (("reproduce", "table1", "seeds=[1,1]"), ("seeds=[1,1]", "different")),
    "no folder": ((*LORA, "backbone.path=./nowhere"), ("backbone.path=./nowhere", "config.json")),
    "other architecture": ((*LORA, "backbone.path={root}/alien"), ("mamba", "llama")),
    "unknown backbone": ((*LORA, "backbone=pic"), ("backbone=pic", "pico?")),
    "unknown budget": ((*LORA, "budget=dat"), ("budget=dat", "data?")),
    "malformed": ((*LORA, "foo"), ("foo", "KEY=VALUE")),
    "no key": ((*LORA, "=3"), ("=3", "KEY=VALUE")),
    "frozen and uninitialized": (("compose", "--frozen", "--uninitialized"), ("--frozen", "--uninitialized")),
    "frozen but training": (
        ("compose", "--frozen", "method.train_experts=true"),
        ("method.train_experts=false", "method.train_experts=true"),
    ),
    "names and targets": (("compose", "py", "targets=[sums]"), ("py", "targets=[sums]")),
    "indivisible": (("compose", "method.num_blocks=4"), ("method.num_blocks=4", "[1, 2, 3, 6]")),
    "uneven batches": (
        (*LORA, "train.batch.size=3", "train.batch.gradient_accumulation_steps=2"),
        ("train.batch.size=3", "train.batch.gradient_accumulation_steps=2"),
    ),
    "no conf folder": ((*LORA, "--conf", "{root}/nowhere"), ("--conf", "nowhere")),
    "expert of two": (("train", "expert"), ("['py', 'sums']", "--domain")),
    "expert of two by flag": (("train", "expert", "-d", "py,sums"), ("['py', 'sums']", "--domain")),
    "two experts in stage 1": (
        ("train", "expert", "-d", "py", "method.num_experts=2"),
        ("method.num_experts=1", "method.num_experts=2"),
    ),
    "sweep of a glob": ((*LORA, "--sweep", "train.lr=glob(*)"), ("glob(*)", "choice()", "range()")),
    "one bad run of a sweep": ((*LORA, "--sweep", "train.lr=1e-3,-1"), ("train.lr=-1",)),
    "unwritable": ((*LORA, "paths.cache=/dev/null/cache"), ("/dev/null", "Not a directory")),
    "downstream and retention": (
        ("eval", "--downstream", "--retention"),
        ("--downstream", "--retention"),
    ),
    "limit without downstream": (("eval", "--limit", "3"), ("--limit", "go with --downstream")),
    "unknown order": (("prune", "3f2a", "--by", "chang"), ("--by chang", "change?")),
    "nothing to prune": (("prune", "3f2a"), ("paths.runs=", "no such folder")),
    "not trained yet": (("eval", "method=lora"), ("is not finished", "no record in")),
}
USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown command": (("trian",), ("No such command 'trian'", "'train'?")),  # codespell:ignore trian
    "unknown subcommand": (("train", "exprt"), ("No such command 'exprt'", "'expert'?")),
    "unknown flag": ((*LORA, "--agian"), ("No such option: --agian", "--again")),
    "no question": (("eval", "--downstream", "--limit", "0"), ("--limit", "1")),
    "negative jobs": (("reproduce", "table1", "--jobs", "-1"), ("--jobs", "0")),
}


def call(world: World, *words: str) -> Any:
    """Invoke the command line in the world; settings among the words come after the world's own and win."""
    words = tuple(word.replace("{root}", str(world.root)) for word in words)
    given = list(world.overrides)
    if {"-d", "--domain"} & set(words) or any(word.startswith(("targets=", "domain=")) for word in words):
        given = [text for text in given if not text.startswith("targets=")]
    keys = [word.partition("=")[0] for word in words if "=" in word]
    given = [text for text in given if text.partition("=")[0] not in keys]
    conf = [] if "--conf" in words else ["--conf", str(world.conf)]
    return CliRunner().invoke(app, [*words, *given, *conf])


def records(world: World) -> list[Record]:
    return read_records(world.root / "results")


@pytest.fixture
def own(world: World) -> World:
    """Return the world with a configuration folder that the test may add to."""
    conf = world.root / "conf"
    shutil.copytree(world.conf, conf)
    return World(world.root, conf, world.overrides)


@pytest.fixture
def trap(own: World) -> World:
    """Return a world with what some mistakes need: an experiment of another method, a foreign backbone."""
    (own.conf / "experiment" / "of_lora.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: lora\n", "utf-8"
    )
    pico = Path(read_group("backbone", "pico", own.conf)["path"])
    shutil.copytree(pico, own.root / "alien")
    about = json.loads((pico / "config.json").read_text("utf-8"))
    (own.root / "alien" / "config.json").write_text(json.dumps(about | {"model_type": "mamba"}), "utf-8")
    return own


def assert_nothing_ran(world: World) -> None:
    left = [path for name in ("runs", "results") for path in (world.root / name).rglob("*") if path.is_file()]
    assert [path.name for path in left if path.name != "lock"] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_with_the_nearest_right_thing(trap: World, name: str) -> None:
    words, expected = MISTAKES[name]
    result = call(trap, *words)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("mode: ")
    assert [part for part in expected if part not in line] == [], line
    assert_nothing_ran(trap)


@pytest.mark.parametrize("name", USAGE)
def test_a_mistake_of_usage_ends_with_one_line_that_names_it(world: World, name: str) -> None:
    words, expected = USAGE[name]
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2
    assert result.stdout == ""
    *usage, empty, line = result.stderr.splitlines()
    assert [text.partition(" ")[0] for text in usage] == ["Usage:", "Try"]
    assert empty == ""
    assert line.startswith("Error: ")
    assert [part for part in expected if part not in line] == [], line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("domain/mine.yaml", "description: [", ("not YAML", "domain/mine.yaml", "line 2")),
        ("domain/mine.yaml", "- a list", ("domain/mine.yaml",)),
        ("domain/my text.yaml", "", ("my text.yaml", "letters, digits")),
        ("domain/2nd.yaml", "", ("2nd.yaml",)),
        ("domain/code.yaml", "", ("code.yaml",)),
        ("domain/mine.yaml", "description: x", ("domains.mine.licence",)),
        ("domain/mine.yaml", "descr: x", ("domains.mine.descr", "domains.mine.description?")),
        ("method/mine.yaml", "lr: [", ("not YAML", "method/mine.yaml")),
        (
            "method/mine.yaml",
            "_target_: baselines.nowhere.Mine\nlr: 1.0",
            ("baselines.nowhere.Mine", "baselines.nowhere'"),
        ),
        ("method/mine.yaml", "_target_: mode.config.compose\nlr: 1.0", ("mode.config.compose",)),
        ("method/mine.yaml", "_target_: baselines.sft.SFT\nlrr: 1.0", ("method.lrr", "method.lr?")),
        ("experiment/mine.yaml", "# @package _global_\ntrain: {lrr: 1}", ("train.lrr", "train.lr?")),
    ],
)
def test_a_mistake_in_ones_own_yaml_is_told_in_one_line(
    own: World, path: str, text: str, expected: tuple[str, ...]
) -> None:
    (own.conf / path).write_text(text + "\n", "utf-8")
    chosen = "mine" if path.startswith("method/") else "lora"
    used = {"experiment": ["experiment=mine"], "domain": ["evaluate.domains=[mine]"]}.get(path.partition("/")[0], [])
    result = call(own, "train", "baseline", chosen, *used)
    assert result.exit_code == 2, result.exception
    (line,) = result.stderr.splitlines()
    assert [part for part in expected if part not in line] == [], line
    assert_nothing_ran(own)


def test_a_configuration_folder_may_have_any_name(own: World) -> None:
    odd = own.root / "it's mine, v=1"
    own.conf.rename(odd)
    assert call(own, "show", "config", "--conf", str(odd)).exit_code == 0


def walk(command: Any, name: str = "") -> dict[str, Any]:
    """Return every command that does something, by its full name."""
    if not hasattr(command, "commands"):
        return {name: command}
    return {
        key: value for part, inner in command.commands.items() for key, value in walk(inner, f"{name} {part}").items()
    }


def test_no_flag_appears_or_goes_unnoticed() -> None:
    found = {}
    for name, command in walk(typer.main.get_command(app)).items():
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        found[name.strip()] = sorted(max(option.opts, key=len) for option in options)
    assert found == FLAGS


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    lines = result.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS


@pytest.mark.parametrize("name", FLAGS)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert [flag for flag in FLAGS[name] if flag not in result.stdout] == []


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    script = f"import sys, cli.app; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_what_is_asked_is_checked_without_torch() -> None:
    script = (
        "import sys; from mode.config.compose import compose; compose(['method=mode']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize("group", ["domain", "backbone", "table"])
def test_show_lists_the_projects_and_ones_own(own: World, group: str) -> None:
    if group == "table":
        shutil.copy(conf_dirs()[0] / group / "table1.yaml", own.conf / group / "mine.yaml")
    result = CliRunner().invoke(app, ["show", f"{group}s", "--conf", str(own.conf)])
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert names == list_members(group, own.conf)
    assert {"domain": "prose", "backbone": "pico", "table": "mine"}[group] in names


@pytest.mark.slow
def test_show_methods_has_a_row_for_the_projects_and_ones_own(own: World) -> None:
    shutil.copy(conf_dirs()[0] / "method" / "sft.yaml", own.conf / "method" / "mine.yaml")
    (own.conf / "method" / "broken.yaml").write_text("lr: [", "utf-8")
    result = call(own, "show", "methods")
    assert result.exit_code == 0, result.stderr
    _, *lines = result.stdout.partition("\n\n")[0].splitlines()
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert sorted(row[0] for row in rows) == list_members("method", own.conf)
    found = {row[0]: row[1:] for row in rows}
    assert found["mine"] == found["sft"]
    assert "broken.yaml:" in " ".join(found["broken"])
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == [*FAMILIES, "other"]
    assert lines.index("other") < next(number for number, line in enumerate(lines) if "broken" in line)
    assert [line for line in result.stdout.splitlines() if len(line) > 80 and "broken.yaml" not in line] == []


@pytest.mark.parametrize("name", ["lora", "btm", "mode-anchored"])
def test_show_methods_describes_a_method_with_every_setting(name: str) -> None:
    lines = CliRunner().invoke(app, ["show", "methods", "--describe", name]).stdout.splitlines()
    method: Any = compose([f"method={name}"]).method
    assert lines[0] == f"{name}: {type(method).__doc__.splitlines()[0]}"
    assert [method.family in line for line in lines[1:3]] == [True, False]
    assert [method.source in line for line in lines[1:3]] == [False, True]
    said = [line.strip() for line in lines if "=" in line]
    assert [line.partition("=")[0] for line in said] == [f"method.{key}" for key in flatten(asdict(method))]
    assert compose([f"method={name}", *said]).method == method


def test_show_config_is_what_would_run(world: World) -> None:
    result = call(world, "show", "config", "-d", "prose", "seed=3", "method=lora", "method.rank=5")
    shown = yaml.safe_load(result.stdout)
    assert (shown["targets"], shown["seed"], shown["method"]["rank"]) == (["prose"], 3, 5)
    assert shown["method"]["_target_"] == "baselines.lora.LoRA"
    assert sorted(shown["domains"]) == sorted(DOMAINS)


def test_print_config_prints_the_run_and_trains_nothing(world: World) -> None:
    result = call(world, *LORA, "--print-config", "method.rank=5", "--sweep", "seed=0,1")
    assert result.exit_code == 0
    shown = list(yaml.safe_load_all(result.stdout))
    assert [(each["seed"], each["method"]["rank"]) for each in shown] == [(0, 5), (1, 5)]
    assert_nothing_ran(world)


@pytest.mark.slow
def test_sweep_makes_one_run_for_each_value(world: World) -> None:
    result = call(world, *LORA, "--sweep", "seed=0,1", "method.rank=2")
    assert result.exit_code == 0, result.stderr
    made = [(record.seed, record.asked["method"]["rank"]) for record in records(world)]
    assert made == [(0, 2), (1, 2)]


@pytest.mark.parametrize("words", [("train", "expert", "-d", "py"), ("compose", "py", "sums")])
def test_experts_may_be_of_any_settings_of_the_method(world: World, words: tuple[str, ...]) -> None:
    found = call(world, *words, "method=mode-anchored", "--print-config")
    assert found.exit_code == 0
    method = yaml.safe_load(found.stdout)["method"]
    assert (method["anchor"]["source"], method["gate"]["reads"]) == ("self", "output")
    assert method["start"] == ("fresh" if "expert" in words else "experts")
    check_refused(call(world, *words, "method=sft", "--print-config"), "method=sft")


def test_a_sweep_may_go_over_experiments_that_agree_with_the_command(trap: World) -> None:
    shutil.copy(trap.conf / "experiment" / "of_lora.yaml", trap.conf / "experiment" / "too.yaml")
    result = call(trap, *LORA, "--sweep", "experiment=of_lora,too", "--print-config")
    assert [each["method"]["_target_"] for each in yaml.safe_load_all(result.stdout)] == ["baselines.lora.LoRA"] * 2


@pytest.mark.slow
def test_a_baseline_is_trained_once_unless_asked_again(world: World) -> None:
    first = call(world, "train", "baseline", "sft")
    assert first.exit_code == 0, first.stderr
    (path,) = (world.root / "results" / "records").iterdir()
    (record,) = records(world)
    assert record.asked["method"]["_target_"] == "baselines.sft.SFT"
    assert f"run {record.id}: 4 steps" in first.stdout
    heads, *rows = [re.split(r"  +", line) for line in first.stdout.splitlines()[1:]]
    assert heads[:3] == ["domain", "role", "accuracy %"]
    assert {tuple(row[:2]): row[2].split()[0] for row in rows} == {
        (name, "target" if name in ("py", "sums") else "retention"): f"{100 * score['accuracy']:.2f}"
        for name, score in record.happened["scores"].items()
    }
    assert {len(row) for row in rows} == {len(heads)}
    made = path.stat().st_mtime_ns
    second = call(world, "train", "baseline", "sft")
    assert f"run {record.id} is done" in second.stdout
    assert path.stat().st_mtime_ns == made
    third = call(world, "train", "baseline", "sft", "--again")
    assert f"run {record.id}: 4 steps" in third.stdout
    assert path.stat().st_mtime_ns > made
    assert records(world)[0].happened["scores"] == record.happened["scores"]


def test_the_bare_backbone_is_scored_once(world: World) -> None:
    assert "0 steps" in call(world, "train", "baseline", "backbone").stdout
    assert "is done" in call(world, "train", "baseline", "backbone").stdout


@pytest.mark.slow
def test_an_expert_is_kept_as_an_artefact(world: World) -> None:
    result = call(world, "train", "expert", "--domain", "py")
    assert result.exit_code == 0, result.stderr
    (record,) = records(world)
    assert record.asked["targets"] == ["py"]
    assert record.asked["method"]["num_experts"] == 1
    about = json.loads((world.root / "runs" / record.id / "expert" / "expert.json").read_text("utf-8"))
    assert about["domain"] == "py"


@pytest.mark.slow
def test_compose_trains_the_experts_once_and_composes_them_in_each_way(world: World) -> None:
    assert call(world, "compose", "py", "sums", "targets=[py,sums]").exit_code == 0
    stages = {tuple(record.asked["targets"]): record for record in records(world)}
    assert sorted(stages) == [("py",), ("py", "sums"), ("sums",)]
    experts = [stages[("py",)].id, stages[("sums",)].id]
    assert stages[("py", "sums")].provenance["needs"] == experts
    before = {record.id for record in records(world)}
    assert call(world, "compose", "--frozen").exit_code == 0
    (frozen,) = [record for record in records(world) if record.id not in before]
    assert frozen.asked["method"]["train_experts"] is False
    assert frozen.provenance["needs"] == experts
    before.add(frozen.id)
    assert call(world, "compose", "--uninitialized", "py", "sums", "targets=[py,sums]").exit_code == 0
    (fresh,) = [record for record in records(world) if record.id not in before]
    assert fresh.asked["method"]["start"] == "fresh"
    assert fresh.asked["method"]["num_experts"] == 2
    assert fresh.provenance["needs"] == []


@pytest.mark.slow
def test_eval_scores_a_run_from_its_weights_and_compares(world: World) -> None:
    call(world, *LORA)
    (record,) = records(world)
    weights = world.root / "runs" / record.id / WEIGHTS
    result = call(world, "eval", "method=lora")
    assert result.exit_code == 0, result.stderr
    assert "accuracies equal the record's" in result.stdout
    tensors, about = load_tensors(weights)
    save_tensors(weights, {name: tensor + 1.0 for name, tensor in tensors.items()}, about)
    check_refused(call(world, "eval", "method=lora"), str(weights))
    save_tensors(weights, {name: tensor + 1.0 for name, tensor in tensors.items()}, {"run": record.id})  # as of before
    check_refused(call(world, "eval", "method=lora"), "accuracies differ", record.filename)
    weights.unlink()
    lost = call(world, "eval", "method=lora")
    assert lost.exit_code == 2
    assert f"{WEIGHTS}: no such file" in lost.stderr.splitlines()[-1]


@pytest.mark.slow
def test_eval_retention_measures_every_run_against_the_bare_backbone(world: World) -> None:
    call(world, *LORA)
    result = call(world, "eval", "--retention")
    assert result.exit_code == 0, result.stderr
    zero, record = sorted(records(world), key=lambda each: each.happened["steps"])
    heading, bare, row = result.stdout.splitlines()
    assert heading.split() == ["run", "sums", "py", "prose", "target", "retention"]
    assert bare.split()[0].endswith(zero.id)
    accuracy = {name: 100 * score["accuracy"] for name, score in record.happened["scores"].items()}
    gain = accuracy["prose"] - 100 * zero.happened["scores"]["prose"]["accuracy"]
    shown = [f"{accuracy[name]:.2f}" for name in ("sums", "py", "prose")]
    assert row.split()[1:] == [*shown, f"{(accuracy['sums'] + accuracy['py']) / 2:.2f}", f"{gain:+.2f}"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(display: Any, run_id: str, point: dict[str, Any]) -> None:
        if point["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cli.progress.PlainDisplay.point", stop)
        result = call(world, *LORA)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("mode: stopped; the same command continues")
    assert records(world) == []
    assert "interrupted" in call(world, "show", "runs").stdout
    assert call(world, *LORA).exit_code == 0
    assert "interrupted" not in call(world, "show", "runs").stdout
    whole = world.at(world.root / "whole")
    call(whole, *LORA)
    assert records(whole)[0].happened["scores"] == records(world)[0].happened["scores"]


@pytest.mark.slow
def test_show_runs_lists_the_records(world: World) -> None:
    check_refused(call(world, "show", "runs"), f"paths.results={world.root}/results")
    call(world, *LORA)
    (line,) = call(world, "show", "runs").stdout.splitlines()
    (record,) = records(world)
    assert line.split()[:3] == [record.filename.removesuffix(".json"), "4", "steps"]


@pytest.mark.slow
def test_report_writes_a_table_that_check_accepts_until_it_drifts(own: World) -> None:
    (own.conf / "table" / "mine.yaml").write_text(
        "title: Mine\nrows: [{name: lora, label: LoRA, overrides: [method=lora]}]\n"
        f"overrides: {json.dumps([text for text in own.overrides if not text.startswith('paths.')])}\n",
        "utf-8",
    )
    check_refused(call(own, "report", "mine"), f"paths.results={own.root}/results")
    (own.root / "results").mkdir()
    nothing = call(own, "report", "mine")
    assert nothing.exit_code == 2
    check_message(nothing.stderr.splitlines()[-1], suggestion="mode reproduce mine")
    call(own, *LORA)
    result = call(own, "report", "mine")
    assert result.exit_code == 0, result.stderr
    path = own.root / "results" / "mine.md"
    assert path.read_text("utf-8") == result.stdout.removesuffix("\n")
    assert call(own, "report", "mine", "--check").exit_code == 0
    path.write_text(path.read_text("utf-8").replace("LoRA", "LoRa"), "utf-8")
    stale = call(own, "report", "mine", "--check")
    assert stale.exit_code == 2
    assert f"{path} does not follow" in stale.stderr


def test_data_show_tells_size_licence_and_fingerprint(world: World) -> None:
    result = call(world, "data", "show", "-d", "py,prose", "evaluate.domains=[sums]")
    assert result.exit_code == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines() if "test domain" in line] == ["py", "prose"]
    assert result.stdout.count("CC0-1.0") == 2
    rows = [line.split() for line in result.stdout.splitlines()]
    counts = [int(row[1]) for row in rows if row[0] in ("test", "validation", "train", "pretrain")]
    assert sum(counts) == 2 * 120
    prepared = call(world, "data", "prepare", "-d", "py").stdout.split()
    assert prepared[0] == "py:"
    assert prepared[1] in result.stdout
    assert (Path(prepared[-1]) / "meta.json").exists()


@pytest.mark.slow
def test_a_split_of_few_documents_is_warned_of_by_show_and_by_a_run(world: World) -> None:
    conf = world.root / "few"
    shutil.copytree(world.conf, conf)
    (world.root / "few.txt").write_text("\n\n".join(f"{'a few words ' * 20}{number}" for number in range(14)), "utf-8")
    (conf / "domain" / "few.yaml").write_text(
        f"description: few\nlicence: own\nsplits: {{test: 0.2, validation: 0.2, train: 0.6}}\n"
        f'sources: [{{kind: files, paths: [{world.root}/few.txt], separator: "\\n\\n"}}]\n',
        "utf-8",
    )
    few = World(world.root, conf, world.overrides)
    shown = call(few, "data", "show", "-d", "few")
    assert shown.exit_code == 0, shown.stderr
    rows = {
        row[0]: int(row[1]) for row in map(str.split, shown.stdout.splitlines()) if row[0] in ("test", "validation")
    }
    lines = shown.stderr.splitlines()
    assert len(lines) == sum(count <= 5 for count in rows.values()) > 0
    assert all(line.startswith("mode: warning: domain few: ") for line in lines)
    trained = call(few, "train", "baseline", "backbone", "-d", "few")
    assert trained.exit_code == 0, trained.stderr
    assert lines == [line for line in trained.stderr.splitlines() if "warning" in line]


def test_completion_lists_a_group_from_its_folder() -> None:
    assert complete("domain")("") == list_members("domain")
    assert complete("domain")("code,ma") == ["code,math"]
    assert complete("method")("lor") == ["lora", "loramoe"]
    assert complete("method")("nothing") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mode tr", "train"),
        ("mode train baseline lo", "lora"),
        ("mode train expert --domain ma", "math"),
        ("mode reproduce tab", "table1"),
    ],
)
@pytest.mark.parametrize("shell", ["zsh", "bash"])
def test_the_shell_completes(shell: str, typed: str, expected: str) -> None:
    words = {"_TYPER_COMPLETE_ARGS": typed} if shell == "zsh" else {"COMP_WORDS": typed.replace(" ", "\n")}
    words["COMP_CWORD"] = str(typed.count(" "))
    script = "import sys; sys.argv = ['mode']; from cli.app import main; main()"
    environment = os.environ | words | {"_MODE_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert expected in done.stdout.replace('"', " ").replace("'", " ").split()
