"""Old names of settings are accepted wherever a setting can be written, and records keep theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.config import identity
from mode.config.check import check_run, field_names, from_yaml, to_yaml
from mode.config.compose import compose, expand_sweep, parse_overrides, rename_overrides
from mode.config.names import OLD_NAMES, RECORDED, record_names, rename_settings
from mode.config.quoting import format_value
from mode.config.run import Run
from mode.core.errors import ConfigError

VALUES = {
    "train.batch.size": "6",
    "train.batch.gradient_accumulation_steps": "2",
    "train.optim.warmup_ratio": "0.5",
    "train.optim.min_lr_ratio": "0.5",
    "train.optim.weight_decay": "0.5",
    "train.optim.betas": "[0.5,0.6]",
    "train.optim.max_grad_norm": "0.5",
    "train.batch.examples": "5",
    "train.memory.activation_checkpointing": "all",
    "train.kernels.compile": "true",
    "train.memory.frozen_weights": "int8",
    "train.kernels.branch_execution": "batched",
    "train.kernels.cuda_graph": "true",
    "train.parallelism.strategy": "fsdp",
    "train.batch.replay": "{english:0.2}",
    "evaluate.logit_chunk_size": "64",
}
"""A value other than the default of every renamed setting that can be set alone, with the same value as before."""


def setting_of(run: Run, name: str) -> Any:
    """Return a setting by its dotted name."""
    found: Any = run
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("new", VALUES)
def test_an_old_name_of_an_override_makes_the_same_run(new: str) -> None:
    run = compose([f"{new}={VALUES[new]}"])
    assert setting_of(run, new) != setting_of(compose([]), new)
    for sign in ("", "++"):
        assert compose([f"{sign}{RECORDED[new]}={VALUES[new]}"]) == run


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["train.documents=apart"], ["train.batch.intra_document_masking=true"]),
        (["train.documents=joined"], ["train.batch.intra_document_masking=false"]),
        (
            ["train.documents=apart", "train.attention=flex"],
            ["train.batch.intra_document_masking=true", "train.kernels.attention=flex"],
        ),
        (
            ["train.memory=4", "train.activation_checkpointing=auto"],
            ["train.memory={budget_gb: 4, activation_checkpointing: auto}"],
        ),
        (["train={batch_size: 4, clip: 2}"], ["train.batch.size=4", "train.optim.max_grad_norm=2"]),
        (
            ["train.layout=mpmd", "train.in_flight=2", "train.placement=[[0],[1,2]]"],
            [
                "train.parallelism={strategy: mpmd, microbatches_in_flight: 2}",
                "train.parallelism.placement=[[0],[1,2]]",
            ],
        ),
        (["train.memory=null"], []),
    ],
)
def test_old_values_and_groups_of_overrides_make_the_same_run(old: list[str], new: list[str]) -> None:
    assert compose(old) == compose(new)


def test_an_old_name_can_be_swept() -> None:
    (first,), (second,) = expand_sweep(["train.documents=joined,apart"])
    assert not compose([first]).train.batch.intra_document_masking
    assert compose([second]).train.batch.intra_document_masking


def test_a_setting_with_different_values_under_two_names_is_refused() -> None:
    for given in (["train.accumulate=2", "train.batch.gradient_accumulation_steps=4"], ["train={clip: 2}"] * 2):
        if len({*given}) == 1:
            assert compose(given) == compose(given[:1])
            continue
        for order in (given, given[::-1]):
            with pytest.raises(
                ConfigError, match=r"^train\.accumulate=2: train\.batch\.gradient_accumulation_steps=4 is"
            ):
                compose(order)
    assert compose(["train.clip=2", "train.optim.max_grad_norm=2"]).train.optim.max_grad_norm == 2
    assert compose(["train.clip=2", "train.clip=3"]).train.optim.max_grad_norm == 3
    with pytest.raises(ConfigError, match=r"^train\.clip=2: train\.optim\.max_grad_norm=3 is"):
        rename_settings({"train": {"clip": 2, "optim": {"max_grad_norm": 3}}})


def test_yaml_of_a_user_may_have_old_names(tmp_path: Path) -> None:
    path = tmp_path / "experiment" / "older.yaml"
    path.parent.mkdir()
    path.write_text(
        "# @package _global_\ntrain: {batch_size: 4, memory: 3, activation_checkpointing: auto, documents: apart}\n",
        encoding="utf-8",
    )
    train = compose(["experiment=older"], tmp_path).train
    assert (train.batch.size, train.memory.budget_gb, train.memory.activation_checkpointing) == (4, 3.0, "auto")
    assert train.batch.intra_document_masking
    assert compose(["experiment=older", "train.batch.size=2"], tmp_path).train.batch.size == 2
    path.write_text("# @package _global_\ntrain: {batch_sizes: 4}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^train\.batch_sizes: no such setting; did you mean train\.batch\.size\?$"):
        compose(["experiment=older"], tmp_path)


def write_experiments(folder: Path, **texts: str) -> Path:
    """Write experiments of a user's own, and return the folder of configuration."""
    for name, text in texts.items():
        path = folder / "experiment" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_of_two_files_the_later_wins_by_either_name(tmp_path: Path) -> None:
    conf = write_experiments(
        tmp_path,
        older="defaults: [table1_smollm2, _self_]\ntrain: {accumulate: 8, documents: apart}",
        newer="defaults: [older, _self_]\ntrain: {batch: {gradient_accumulation_steps: 16}}",
        oldest="defaults: [newer, _self_]\ntrain: {accumulate: 32}",
        both="train: {accumulate: 2, batch: {gradient_accumulation_steps: 4}}",
    )
    assert compose(["experiment=table1_smollm2"]).train.batch.gradient_accumulation_steps not in (8, 16, 32)
    for name, steps in {"older": 8, "newer": 16, "oldest": 32}.items():
        batch = compose([f"experiment={name}"], conf).train.batch
        assert (batch.gradient_accumulation_steps, batch.intra_document_masking) == (steps, True)
    with pytest.raises(ConfigError, match=r"^train\.accumulate=2: train\.batch\.gradient_accumulation_steps=4 is"):
        compose(["experiment=both"], conf)


def test_a_file_for_one_group_of_settings_may_have_old_names(tmp_path: Path) -> None:
    conf = write_experiments(tmp_path, small="")
    (conf / "experiment" / "small.yaml").write_text("# @package train\nbatch_size: 3\nlr: 0.5\n", encoding="utf-8")
    train = compose(["experiment=small"], conf).train
    assert (train.batch.size, train.lr) == (3, 0.5)


def test_an_interpolation_may_have_an_old_name(tmp_path: Path) -> None:
    conf = write_experiments(
        tmp_path, one="train: {accumulate: '${train.batch_size}', examples: 5}\nseed: ${train.clip}"
    )
    run = compose(["experiment=one", "train.batch.size=6", "train.optim.max_grad_norm=2"], conf)
    assert (run.train.batch.gradient_accumulation_steps, run.seed) == (6, 2)
    run = compose(["seed=${train.batch_size}", "train={accumulate: '${ train.batch_size }'}", "train.batch_size=3"])
    assert (run.seed, run.train.batch.gradient_accumulation_steps) == (3, 3)
    assert rename_overrides([r"paths.runs='\${train.clip}'"]) == [r"paths.runs='\${train.clip}'"]


def test_a_key_below_an_old_name_is_one_below_the_new_name(tmp_path: Path) -> None:
    conf = write_experiments(tmp_path, replayed="train: {replay: {english: 0.1}}")
    for name in ("train.replay.english", "train.batch.replay.english"):
        assert compose(["experiment=replayed", f"{name}=0.3"], conf).train.batch.replay == {"english": 0.3}
    assert (
        compose(["train.memory.activation_checkpointing=auto", "train.memory.budget_gb=3"]).train.memory.budget_gb == 3
    )


@pytest.mark.parametrize(
    "given",
    [
        ["train={batch_size: 4}", "train.batch.size=8"],
        ["train.batch_size=4", "train={batch: {size: 8}}"],
        ["train={batch_size: 4}", "train.batch={size: 8}"],
        ["train.replay={english: 0.2}", "train.batch.replay.english=0.3"],
        ["train.replay=null", "train.batch.replay={english: 0.3}"],
        ["train.documents=joined", "train={batch: {intra_document_masking: true}}"],
    ],
)
def test_groups_with_different_values_under_two_names_are_refused(given: list[str]) -> None:
    for order in (given, given[::-1]):
        with pytest.raises(ConfigError, match="is the same setting under its new name"):
            compose(order)


def test_groups_with_the_same_value_under_two_names_are_accepted() -> None:
    assert compose(["train={batch_size: 4, documents: apart}", "train.batch={size: 4}"]).train.batch.size == 4
    assert (
        compose(["train={batch_size: 4}", "train.optim={max_grad_norm: 2}", "train.batch_size=5"]).train.batch.size == 5
    )


@pytest.mark.parametrize("text", ["null", "True", "false", "NaN", "inf", "1e3", "7", "none", "naïve", "a b", "${seed}"])
def test_a_text_stays_a_text_when_an_override_is_rewritten(text: str) -> None:
    (written,) = rename_overrides([f"train={{documents: apart, precision: '{text}'}}"])
    (parsed,) = parse_overrides([written])
    assert parsed.value == {"batch": {"intra_document_masking": True}, "precision": text}
    assert parse_overrides([f"seed={format_value([text])}"])[0].value == [text]


def test_a_run_that_an_earlier_version_saved_is_read() -> None:
    run = compose(["train.batch.replay={english: 0.2}", "train.batch.intra_document_masking=true"])
    plain = yaml.safe_load(to_yaml(run))
    older = {**record_names(plain), "method": plain["method"]}
    assert older["train"]["documents"] == "apart"
    assert older["train"]["memory"] is None
    assert not {"batch", "optim", "kernels", "parallelism"} & older["train"].keys()
    assert from_yaml(yaml.safe_dump(older)) == run == from_yaml(to_yaml(run))


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("train.accumulates", "train.batch.gradient_accumulation_steps"),
        ("train.max_grad_norm", "train.optim.max_grad_norm"),
        ("train.batch.sizes", "train.batch.size"),
        ("method.anchor.shrae", "method.anchor.share"),
        ("evaluate.chnk", "evaluate.logit_chunk_size"),
    ],
)
def test_the_nearest_setting_is_named_as_it_is_written_today(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([f"{given}=1", "method=lora"])
    assert str(caught.value) == f"{given}: no such setting; did you mean {nearest}?"


def test_every_renamed_setting_exists_and_no_old_name_does() -> None:
    for new, old in RECORDED.items():
        for name, known in ((new, True), (old, False)):
            *groups, leaf = name.split(".")
            assert (leaf in field_names(Run, groups)) == known or old == "train.memory", name
    assert len(OLD_NAMES) == len(RECORDED)


def test_records_have_the_flat_names() -> None:
    run = compose(["train.batch.intra_document_masking=true", "train.kernels.compile=true", "train.log_every=5"])
    train = identity.describe_run(run)["train"]
    assert train == {
        "steps": 80,
        "batch_size": 8,
        "accumulate": 1,
        "sequence_length": 256,
        "lr": None,
        "warmup": 0.05,
        "final_lr": 0.1,
        "weight_decay": 0.01,
        "betas": [0.9, 0.95],
        "clip": 1.0,
        "precision": "auto",
        "device": "auto",
        "threads": 1,
        "compile": True,
        "documents": "apart",
    }
    budget = identity.describe_run(compose(["train.memory={activation_checkpointing: auto, budget_gb: 4}"]))["train"]
    assert (budget["memory"], budget["activation_checkpointing"]) == (4.0, "auto")
    assert "parallelism" not in identity.describe_run(compose(["train.parallelism.strategy=fsdp"]))["train"]


@pytest.mark.parametrize("name", ["self", "none"])
def test_a_domain_with_the_name_of_an_anchor_source_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "domain" / f"{name}.yaml"
    path.parent.mkdir()
    splits = "{test: 0.2, validation: 0.2, train: 0.6}"
    path.write_text(
        f"description: d\nlicence: l\nsources: [{{kind: files, paths: [x]}}]\nsplits: {splits}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=rf"^domain {name}: .*method\.anchor\.source"):
        compose([], tmp_path)


def test_plain_data_of_a_run_need_not_say_defaults() -> None:
    plain = yaml.safe_load(to_yaml(compose([])))
    del plain["train"], plain["seed"]
    assert check_run(plain) == compose([])
