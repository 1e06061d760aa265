"""What a user writes wrongly on the command line or in YAML is refused in one line, and only where it is used."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mode.config import groups, registry
from mode.config.check import from_yaml, to_yaml, validate
from mode.config.compose import compose, compose_groups, expand_sweep, list_settings, parse_overrides
from mode.config.groups import conf_dirs, read_group
from mode.config.quoting import quote
from mode.config.run import Budget
from mode.launch.launchers import read_launcher
from mode.planning.machine import Device, read_machine
from tests.support.refusals import refused

GOOD = "description: d\nlicence: l\nsources: [{kind: stdlib}]\nsplits: {train: 0.8, validation: 0.1, test: 0.1}\n"
BROKEN = {
    "latin": "description: é\n".encode("latin-1"),
    "utf16": GOOD.encode("utf-16"),
    "unclosed": b"description: [",
    "list": b"- 1",
    "huge": b"description: " + b"9" * 5000,
    "deep": b"description: " + b"[" * 1200,
    "reference": GOOD.replace("licence: l", "licence: ${nothing}").encode(),
    "unset": GOOD.replace("licence: l", "licence: ???").encode(),
    "defaults": b"defaults: [nothing]\n" + GOOD.encode(),
    "empty": b"",
    "splits": GOOD.replace("0.8", "0.9").encode(),
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Return a folder of one's own configuration with one domain that is right."""
    (tmp_path / "domain").mkdir()
    (tmp_path / "domain" / "mine.yaml").write_text(GOOD, "utf-8")
    return tmp_path


@pytest.mark.slow
def test_broken_domains_fail_only_the_runs_that_use_them(conf: Path) -> None:
    for name, content in BROKEN.items():
        (conf / "domain" / f"{name}.yaml").write_bytes(content)
    assert compose(["targets=[mine]"], conf).domains["mine"].licence == "l"
    for name in BROKEN:
        with refused(name) as caught:
            compose([f"targets=[{name}]"], conf)
        assert name in ("empty", "splits") or str(conf / "domain" / f"{name}.yaml") in str(caught.value)


def test_a_broken_domain_of_a_package_fails_only_the_runs_that_use_it(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conf / "domain" / "latin.yaml").write_bytes(BROKEN["latin"])
    for module in (groups, registry):
        monkeypatch.setattr(module, "list_registered_folders", lambda: (conf,))
    for cached in (compose_groups, list_settings):  # installed packages do not change while a program runs
        cached.cache_clear()
    try:
        assert compose(["targets=[mine]"]).targets == ("mine",)
        with refused(str(conf / "domain" / "latin.yaml"), "UTF-8"):
            compose(["targets=[latin]"])
    finally:
        for cached in (compose_groups, list_settings):
            cached.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latin", "utf16", "unclosed", "list", "huge", "deep"])
def test_any_file_that_is_not_yaml_is_named(conf: Path, name: str) -> None:
    for group in ("method", "table", "launcher", "device"):
        (conf / group).mkdir()
        (conf / group / "x.yaml").write_bytes(BROKEN[name])
    for read in (
        lambda: compose(["method=x"], conf),
        lambda: read_group("table", "x", conf),
        lambda: read_launcher("x", conf),
        lambda: read_machine(Device, "device", "x", conf),
    ):
        with refused("x.yaml"):
            read()


@pytest.mark.slow
@pytest.mark.parametrize("defaults", ["null", "{a: 1}", "[{1: 2}]", "[nothing]", "[null]", "3"])
def test_a_wrong_list_of_defaults_is_refused_by_name(conf: Path, defaults: str) -> None:
    (conf / "experiment").mkdir()
    (conf / "experiment" / "x.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\nseed: 1\n", "utf-8")
    with refused("experiment"):
        compose(["experiment=x"], conf)


def test_settings_of_a_run_that_are_not_yaml_are_named() -> None:
    text = to_yaml(compose([]))
    assert from_yaml(text) == compose([])
    for broken in (b"a: [", b"\xff\xff", text.partition("method:")[0].encode(), b"3", b"seed: " + b"9" * 5000):
        with refused("here.yaml"):
            from_yaml(broken, "here.yaml")


@pytest.mark.parametrize("name", ["true", "null", "nan", "no", "1e3", "a b", "é"])
def test_a_file_whose_name_yaml_reads_as_a_value_is_refused(conf: Path, name: str) -> None:
    (conf / "domain" / f"{name}.yaml").write_text(GOOD, "utf-8")
    with refused(f"{name}.yaml"):
        compose([], conf)


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with refused(f"--conf {tmp_path}"):
        conf_dirs(tmp_path)
    with refused("--conf", "none"):
        conf_dirs(tmp_path / "none")
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains" / "x.yaml").write_text(GOOD, "utf-8")
    with refused(f"--conf {tmp_path}", suggestion="domain"):
        conf_dirs(tmp_path)


@pytest.mark.parametrize("group", ["../domain", "domain/../method"])
def test_a_name_from_outside_reaches_no_other_file(group: str) -> None:
    with refused("../"):
        read_group("table", f"{group}/code" if group.startswith("..") else f"../{group}/lora")


@pytest.mark.parametrize(
    "override",
    ["seed=true", "train.steps=true", "train.lr=true", "train.batch.size=true", "train.optim.betas=[0.9,false]"],
)
def test_true_is_no_number(override: str) -> None:
    with refused(override.partition("=")[0]):
        compose([override])


def test_true_is_no_number_in_any_settings(conf: Path) -> None:
    with refused("num_blocks", "number"):
        validate(Budget, {"policy": "params", "num_blocks": True, "expert_layers": 1}, "")
    (conf / "launcher").mkdir()
    (conf / "launcher" / "x.yaml").write_text("kind: ray\nnproc: true\n", "utf-8")
    with refused("launcher/x.yaml", "nproc", "number"):
        read_launcher("x", conf)


@pytest.mark.parametrize("override", ["train.kernels.cuda_graph=false", "train.kernels.compile=auto", "train.lr=1"])
def test_what_is_right_stays_right(override: str) -> None:
    compose([override])


@pytest.mark.parametrize("digits", [4301, 5000, 100_000])
def test_a_number_of_thousands_of_digits_is_refused_in_a_short_line(digits: int) -> None:
    with refused("seed=") as caught:
        compose([f"seed={'9' * digits}"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "sweep",
    ["range(0,1,0)", "range(0,1.0,0)", "range(0,inf)", "range(0,nan)", "range(5,1)", "range(0,1e9)", "range(1,2,nan)"],
)
def test_a_sweep_without_an_end_or_a_value_is_refused(sweep: str) -> None:
    with refused(f"seed={sweep}"):
        expand_sweep([f"seed={sweep}"])


def test_a_sweep_over_two_long_ranges_is_refused_before_it_is_made() -> None:
    with refused("train.steps=range(0,9000)"):
        expand_sweep(["seed=range(0,9000)", "train.steps=range(0,9000)"])


ODD = [
    *("~/x", "runs/epoch=3-step=4.ckpt", "日本", "it's", "a#b", "my dir/model(1)", '"', "'"),
    *("a\\ (b", "x\\'(\\", "[a", "a'b\"c;", '(\\"'),
]
"""Texts that Hydra's grammar does not read without quotes."""


@pytest.mark.parametrize("value", ODD)
def test_the_quoted_form_of_a_message_works_when_it_is_pasted(value: str) -> None:
    with refused("quote") as caught:
        parse_overrides([f"paths.runs={value}"])
    (pasted,) = shlex.split(str(caught.value).partition("quote it: ")[2])
    assert compose([pasted]).paths.runs == value


@pytest.mark.parametrize("override", ["a b=c(", "paths.runs=${x", "seed", "=", "paths.runs=a(\nb", "x=" + "(" * 900])
def test_no_quotes_are_suggested_where_they_do_not_help(override: str) -> None:
    with refused() as caught:
        parse_overrides([override])
    assert "quote it" not in str(caught.value)


@pytest.mark.parametrize("value", [*ODD, "a\\b", "a\\\\", "plain", "", "a\\'", "\\\\'x'\\"])
@pytest.mark.parametrize("mark", ["'", '"'])
def test_quoted_text_is_read_as_it_was(value: str, mark: str) -> None:
    assert OverridesParser.create().parse_override(f"x={quote(value, mark)}").value() == value
