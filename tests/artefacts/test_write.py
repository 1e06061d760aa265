"""Models people keep: written whole or on their backbone, experts joining and leaving without training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.artefacts.edit import join_experts, keep_experts
from mode.artefacts.find import FoundModel, find_model, list_branches
from mode.artefacts.write import write_model
from mode.config.compose import compose
from mode.modular.model import MoDEForCausalLM
from mode.records.record import Record
from mode.runs.execute import execute
from tests.cli.test_cli import call, records
from tests.conftest import World
from tests.modular.test_artefact import DAMAGES, handed, stage_one, untargeted  # noqa: F401  (handed is a fixture)
from tests.support.refusals import check_refused, refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


def composed(world: World, *overrides: str) -> tuple[Record, FoundModel]:
    record = execute(compose([*world.overrides, "method=mode", *overrides], world.conf), weights=True)
    return record, find_model(record.id, world.root / "runs")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.slow
def test_taking_out_all_experts_but_one_leaves_exactly_its_stage_one_model(world: World) -> None:
    # Stage 2 trained nothing, so the composed gates are those of stage 1.
    given = ("train.steps=0",)
    py, folder = stage_one(world, "py")
    _, other = stage_one(world, "sums")
    _, recalled = composed(world, *given, f"method.experts=['{folder}', '{other}']")
    alone = keep_experts(recalled, ["py"])
    assert (logits(alone) - logits(find_model(py.id, world.root / "runs").model)).abs().max() < 1e-5
    assert alone.config.experts == ["py"]


@pytest.mark.slow
def test_an_expert_that_leaves_and_joins_again_changes_nothing(world: World) -> None:
    _, folder = stage_one(world, "py")
    _, other = stage_one(world, "sums")
    record, recalled = composed(world, "train.steps=0", f"method.experts=['{folder}', '{other}']")
    before = logits(recalled.model)
    without = keep_experts(recalled, ["py"])
    assert (logits(without) - before).abs().max() > 1e-3
    again = join_experts(FoundModel(without, recalled.tokenizer, recalled.place, None), other)
    assert (logits(again) - before).abs().max() < 1e-5
    assert sum(parameter.numel() for parameter in again.parameters()) == record.happened["parameters"]["total"]


@pytest.mark.slow
def test_a_trained_composition_keeps_the_odds_of_those_that_stay(world: World) -> None:
    from mode.gating.meter import read_token_gates

    _, recalled = composed(world, "train.lr=0.05")
    before = read_token_gates(recalled.model, IDS[0].tolist())[:, 0]  # the first block's input is the same after
    after = read_token_gates(keep_experts(recalled, ["sums"]), IDS[0].tolist())[:, 0]
    torch.testing.assert_close(after[:, 1] / after[:, 0], before[:, 2] / before[:, 0])


@pytest.mark.slow
def test_the_commands_write_models_that_load(world: World) -> None:
    record, recalled = composed(world)
    expected = logits(recalled.model)
    whole, part = world.root / "whole", world.root / "part"
    result = call(world, "export", record.id, str(whole))
    assert result.exit_code == 0, result.output
    loaded = MoDEForCausalLM.from_pretrained(whole)
    assert torch.equal(logits(loaded), expected)
    assert "experts for py, sums" in (whole / "README.md").read_text("utf-8")
    removed = call(world, "expert", "remove", str(whole), "py", str(part))
    assert removed.exit_code == 0, removed.output
    sums_alone = find_model(str(part), world.root / "runs")
    assert list_branches(sums_alone) == ("backbone", "sums")
    _, folder = stage_one(world, "py")
    added = call(world, "expert", "add", str(part), str(folder), str(world.root / "both"))
    assert added.exit_code == 0, added.output
    assert list_branches(find_model(str(world.root / "both"), world.root / "runs")) == ("backbone", "sums", "py")
    assert call(world, "generate", str(whole), "def f", "--max-tokens", "3").exit_code == 0


@pytest.mark.slow
def test_a_model_on_its_backbone_holds_experts_alone_and_checks_the_backbone(world: World) -> None:
    record, recalled = composed(world)
    expected = logits(recalled.model)
    part = world.root / "part"
    write_model(recalled.model, recalled.place, part, embed=False)
    size = record.happened["parameters"]
    assert (part / "model.safetensors").stat().st_size < 4 * size["added"] + 20_000
    assert torch.equal(logits(find_model(str(part), world.root / "runs").model), expected)
    about = json.loads((part / "config.json").read_text("utf-8"))
    about["backbone"]["fingerprint"] = "0123"
    (part / "config.json").write_text(json.dumps(about), "utf-8")
    with refused("pico", "0123"):
        find_model(str(part), world.root / "runs")


def test_merging_is_exact_at_the_ends_and_for_an_untrained_copy(world: World) -> None:
    from mode.artefacts.edit import merge_expert
    from tests.modular.test_modular import force, modular, pico

    bare = pico(world)
    expected = logits(bare)
    one = logits(
        merge_expert(modular(world, num_experts=1, num_blocks=6, init="copy"), [0.3] * 6)
    )  # the expert is its block's copy
    assert (one - expected).abs().max() < 1e-5
    for share in (0.0, 1.0):
        model = modular(world, num_experts=1, num_blocks=6, init="random")
        force(model, int(share))
        wanted = logits(model)
        assert torch.equal(wanted, expected) is (share == 0.0)
        assert (logits(merge_expert(model, [share] * 6)) - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_a_merged_export_is_a_plain_decoder_of_the_backbones_size(world: World) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    record, _ = stage_one(world, "py", "train.lr=0.02")
    result = call(world, "export", record.id, str(world.root / "merged"), "--merge")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("validation accuracy: ")
    loaded = AutoModelForCausalLM.from_pretrained(world.root / "merged")
    assert type(loaded) is LlamaForCausalLM
    size = record.happened["parameters"]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == size["total"] - size["added"]
    assert call(world, "generate", str(world.root / "merged"), "def f", "--max-tokens", "3").exit_code == 0
    # A folder says nothing of its data, and a thinner expert has no partner for every layer.
    assert call(world, "export", record.id, str(world.root / "whole")).exit_code == 0
    for words, named in {
        (str(world.root / "whole"),): ("validation", "py"),
        (stage_one(world, "py", "method.num_blocks=3")[0].id,): ("expert has 1", "block has 2"),
    }.items():
        check_refused(call(world, "export", *words, str(world.root / "new"), "--merge"), *named)
        assert not (world.root / "new").exists()


@pytest.mark.slow
def test_a_model_folder_is_composed_and_fine_tuned(world: World) -> None:
    _, recalled = composed(world, "train.lr=0.02")
    expected = logits(recalled.model)
    for name, embed in (("whole", True), ("part", False)):
        write_model(recalled.model, recalled.place, world.root / name, embed=embed)
        assert call(untargeted(world), "compose", str(world.root / name), "train.steps=0").exit_code == 0
    assert len({each.id for each in records(world)}) == 4  # two experts, the composition, and this, from either folder
    (fresh,) = [each for each in records(world) if "artefacts" in each.asked]
    assert (logits(find_model(fresh.id, world.root / "runs").model) - expected).abs().max() < 1e-5
    tuned = call(untargeted(world), "compose", str(world.root / "whole"), "train.lr=0.02")
    assert tuned.exit_code == 0, tuned.output
    assert "expert for py" in call(world, "expert", "show", str(world.root / "whole")).stdout
    scores = [each.happened["scores"] for each in records(world) if "artefacts" in each.asked]
    assert scores[0] != scores[1]


@pytest.mark.slow
def test_a_model_folder_that_cannot_be_composed_is_refused_in_one_line(world: World) -> None:
    _, recalled = composed(world)
    whole = world.root / "whole"
    write_model(recalled.model, recalled.place, whole, embed=True)
    content, about = (whole / "model.safetensors").read_bytes(), (whole / "config.json").read_text("utf-8")
    before = len(records(world))

    def say(**changes: Any) -> None:
        (whole / "config.json").write_text(json.dumps(json.loads(about) | changes), "utf-8")

    backbone = json.loads(about)["backbone"]
    for damage, named in {
        lambda: (whole / "model.safetensors").write_bytes(content[:-50]): ("model.safetensors",),
        lambda: (whole / "config.json").write_text("[]", "utf-8"): ("config.json",),
        lambda: say(model_type="llama"): (str(whole), "experts"),
        lambda: say(backbone=backbone | {"fingerprint": "0123"}): ("pico", "0123"),
        lambda: say(backbone={}): ("backbone", "None"),
        lambda: say(gate={"norm": True}): ("method.gate.norm=True", "gate.norm=False"),
        lambda: say(experts=["py", "sums", "more"]): ("domain more",),
        lambda: say(num_blocks=3): ("method.num_blocks=3", "num_blocks=6"),
    }.items():
        damage()
        check_refused(call(untargeted(world), "compose", str(whole)), *named)
        assert len(records(world)) == before
        (whole / "model.safetensors").write_bytes(content)
        (whole / "config.json").write_text(about, "utf-8")


@pytest.mark.slow
def test_half_precision_halves_the_size_and_hardly_moves_the_logits(world: World) -> None:
    record, recalled = composed(world)
    expected = logits(recalled.model)
    for name in ("fp32", "bf16"):
        assert call(world, "export", record.id, str(world.root / name), "--precision", name).exit_code == 0
    sizes = [(world.root / name / "model.safetensors").stat().st_size for name in ("bf16", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]
    low = logits(find_model(str(world.root / "bf16"), world.root / "runs").model).float()
    assert (low - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "lora"])
def test_other_methods_export_as_plain_models(world: World, method: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    given = [*world.overrides, f"method={method}", "train.lr=0.02"]
    record = execute(compose(given, world.conf), weights=True)
    expected = logits(find_model(record.id, world.root / "runs").model)
    assert call(world, "export", record.id, str(world.root / "plain")).exit_code == 0
    loaded = AutoModelForCausalLM.from_pretrained(world.root / "plain")
    assert type(loaded) is LlamaForCausalLM
    assert (logits(loaded) - expected).abs().max() < 1e-5
    bare = execute(compose([*world.overrides, "method=backbone"], world.conf))
    assert record.happened["scores"] != bare.happened["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["btm", "btx", "molora", "moelora"])
def test_a_model_that_no_class_of_the_library_loads_is_generated_from_and_not_exported(
    world: World, method: str
) -> None:
    run = compose([*world.overrides, f"method={method}"], world.conf)
    run_id = execute(run, weights=True).id
    assert call(world, "generate", run_id, "def f", "--max-tokens", "3").exit_code == 0
    result = call(world, "export", run_id, str(world.root / "exported"))
    check_refused(result, "transformers")
    assert not (world.root / "exported").exists()


@pytest.mark.slow
def test_an_export_loads_in_a_process_that_knows_only_the_auto_classes(world: World) -> None:
    record, recalled = composed(world)
    assert call(world, "export", record.id, str(world.root / "whole")).exit_code == 0
    program = (
        "import mode.modular.model, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(world.root / 'whole')!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(world.root / 'whole')!r})\n"
        "print(model(**tokenizer('def f', return_tensors='pt')).logits.sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ids = torch.tensor(recalled.tokenizer.encode(["def f"]))
    with torch.no_grad():
        expected = recalled.model(input_ids=ids).logits.sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_looking_at_experts_and_gates(world: World) -> None:
    record, _ = composed(world)
    py, folder = stage_one(world, "py")
    shown = call(world, "expert", "show", str(folder)).stdout
    assert shown.startswith("expert for py")
    assert py.id in shown
    assert "6 blocks, 1 layers per expert and block\n  py\n  sums" in call(world, "expert", "show", record.id).stdout
    page = world.root / "gates.html"
    result = call(world, "analyze", "gates", record.id, "--html", str(page), "--tokens", "20")
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["domain", "block", "backbone", "py", "sums", "entropy"]
    assert len(rows) == 3 * 6
    assert page.read_text("utf-8").count("<h2>") == 3
    test = call(world, "analyze", "gates", record.id, "--split", "test").stdout.splitlines()[1].split()
    assert [float(x) for x in test[2:5]] == [round(x, 3) for x in record.happened["gates"]["sums"]["mean"][0]]


@pytest.mark.slow
def test_mistakes_are_told_in_one_line_and_write_nothing(world: World) -> None:
    record, _ = composed(world)
    bare = execute(compose([*world.overrides, "method=sft"], world.conf), weights=True)
    _, folder = stage_one(world, "py")
    new, full = str(world.root / "new"), world.root / "full"
    full.mkdir()
    (full / "kept").write_text("kept", "utf-8")
    cases = {
        ("export", record.id, str(full)): (str(full),),
        ("export", record.id, str(world.root / "no" / "where")): (str(world.root / "no"),),
        ("export", record.id, new, "--experts", "py,sumz"): ("sumz", "py, sums", "sums?"),
        ("export", record.id, new, "--experts", ","): ("expert",),
        ("export", bare.id, new, "--experts", "py"): ("no experts",),
        ("export", "zzz", new): ("zzz", str(world.root / "runs")),
        ("expert", "remove", record.id, "pz", new): ("pz", "py, sums", "py?"),
        ("expert", "remove", bare.id, "py", new): ("no experts",),
        ("expert", "add", record.id, str(folder), new): ("expert for py",),
        ("expert", "add", record.id, "nothing", new): ("nothing", str(world.root / "runs")),
        ("expert", "show", "nothing"): ("nothing", str(world.root / "runs")),
        ("export", record.id, new, "--merge"): ("merged", "py, sums"),
        ("export", bare.id, new, "--merge"): ("no experts",),
        ("expert", "show", bare.id): (bare.id, "experts"),
        ("analyze", "gates", bare.id): ("no experts",),
    }
    for words, named in cases.items():
        check_refused(call(world, *words), *named)
        assert not Path(new).exists()
    assert [path.name for path in full.iterdir()] == ["kept"]
    assert [path.name for path in world.root.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "unknown domain"])
def test_a_damaged_or_foreign_expert_does_not_join(world: World, handed: Path, name: str) -> None:  # noqa: F811
    record, _ = composed(world, "targets=[sums]", "method.experts=[]", "method.start=experts")
    damage, _ = DAMAGES[name]
    damage(handed)
    check_refused(call(world, "expert", "add", record.id, str(handed), str(world.root / "new")), str(handed))
    assert not (world.root / "new").exists()


@pytest.mark.slow
def test_a_damaged_model_folder_is_refused_in_one_line(world: World) -> None:
    record, _ = composed(world)
    whole = world.root / "whole"
    assert call(world, "export", record.id, str(whole)).exit_code == 0
    weights = whole / "model.safetensors"
    content = weights.read_bytes()
    for damage, named in {
        lambda: weights.write_bytes(content[:-100]): "model.safetensors",
        lambda: weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1])): "model.safetensors",
        lambda: (whole / "config.json").write_text("{", "utf-8"): "config.json",
        lambda: weights.unlink(): "model.safetensors",
    }.items():
        before = (whole / "config.json").read_text("utf-8")
        damage()
        check_refused(call(world, "generate", str(whole), "x"), named)
        weights.write_bytes(content)
        (whole / "config.json").write_text(before, "utf-8")
