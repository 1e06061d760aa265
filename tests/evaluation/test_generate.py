"""Text from any run, the gates behind it, and what a record says of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli.app import app
from cli.generate import decode_prompt
from mode.artefacts.find import FoundModel, find_model, find_run, list_branches
from mode.backbone.load import load_model
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone
from mode.config.compose import compose
from mode.evaluation.complete import complete_prompts
from mode.evaluation.generate import Piece, Sampling, choose_token, fit_prompt, generate
from mode.gating.meter import read_token_gates
from mode.modular.block import find_blocks
from mode.report.generated_text import Section, to_html
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.recite import (
    BOS,
    CONTEXT,
    EOS,
    TURN,
    make_tokenizer,
    write_continuation,
    write_reciter,
)
from tests.support.refusals import check_refused, refused

METHODS = {
    "mode": ("method=mode",),
    "mode-2x-uninit": ("method=mode", "method.start=fresh"),
    "mode-head": ("method=mode", "method.start=fresh", "method.head_rank=4"),
    "sft": ("method=sft",),
    "lora": ("method=lora",),
}


def trained(world: World, name: str) -> tuple[str, FoundModel]:
    record = execute(compose([*world.overrides, *METHODS[name]], world.conf))
    return record.id, find_model(record.id, world.root / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_greedy_text_is_the_argmax_of_full_forwards(world: World, name: str) -> None:
    _, recalled = trained(world, name)
    ids = recalled.tokenizer.encode(["def f"])[0]
    made = list(generate(recalled.model, recalled.tokenizer, "def f", Sampling(max_tokens=8)))
    assert len(made) == 8
    expected: list[int] = []
    for _ in range(8):
        with torch.no_grad():
            expected.append(int(recalled.model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax()))
    assert "".join(piece.text for piece in made) == recalled.tokenizer.decode(expected).rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )


@pytest.mark.slow
def test_gates_of_the_pieces_are_those_that_predicted_them(world: World) -> None:
    _, recalled = trained(world, "mode")
    assert list_branches(recalled) == ("backbone", "py", "sums")
    with torch.no_grad():
        for block in find_blocks(recalled.model):
            block.gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    prompt = "def f1(x):"
    made = list(generate(recalled.model, recalled.tokenizer, prompt, Sampling(max_tokens=5)))
    ids = recalled.tokenizer.encode([prompt])[0]
    continued = recalled.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    weights = read_token_gates(recalled.model, continued[0].tolist())
    assert weights.shape == (len(ids) + 4, 6, 3)
    for piece, expected in zip(made, weights[-5:], strict=True):
        torch.testing.assert_close(torch.tensor(piece.gates), expected)


@pytest.mark.slow
def test_records_tell_the_mean_gates_of_every_domain(world: World) -> None:
    record = execute(compose([*world.overrides, "method=mode"], world.conf))
    gates = record.happened["gates"]
    assert list(gates) == ["sums", "py", "prose"]
    recalled = find_model(record.id, world.root / "runs")
    split = prepare_run(find_run(record.id, world.root / "runs")).packed["py"].split("test")
    length, sums, count = 32, torch.zeros(6, 3, dtype=torch.float64), 0
    for start in range(0, len(split.tokens) - 1, length):  # every row by itself, its tokens alone
        row = [int(token) for token in split.tokens[start : start + length + 1]]
        sums += read_token_gates(recalled.model, row).double().sum(0)
        count += len(row) - 1
    assert count == record.happened["scores"]["py"]["tokens"]
    torch.testing.assert_close(torch.tensor(gates["py"]["mean"], dtype=torch.float64), sums / count, atol=2e-6, rtol=0)
    for domain in gates.values():
        assert [pytest.approx(1.0, abs=1e-5)] * 6 == [sum(block) for block in domain["mean"]]
        assert all(0 < value <= 1.0987 for value in domain["entropy"])  # ln 3
    assert "gates" not in execute(compose([*world.overrides, "method=sft"], world.conf)).happened


def test_sampling_is_a_function_of_its_seed_and_top_p_narrows_it() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0])

    def draws(**settings: Any) -> list[int]:
        random = torch.Generator().manual_seed(0)
        return [choose_token(logits, Sampling(temperature=1.0, **settings), random) for _ in range(300)]

    assert draws() == draws()
    assert set(draws()) == {0, 1, 2, 3}
    assert set(draws(top_p=0.7)) == {0, 1}
    share = draws().count(0) / 300
    assert share == pytest.approx(logits.softmax(-1)[0].item(), abs=0.08)


def test_html_shows_every_token_and_escapes_what_is_not_text(tmp_path: Path) -> None:
    pieces = [Piece("<b>", ((0.1, 0.9),)), Piece("x", ((0.8, 0.2),))]
    page = to_html("t", [Section("h", "a < b", pieces)], ("backbone", "code"))
    assert "&lt;b&gt;" in page
    assert "a &lt; b" in page
    assert "<b>" not in page
    assert "block 0: backbone 0.10, code 0.90" in page
    assert [piece.branch for piece in pieces] == [1, 0]


@pytest.mark.slow
def test_the_command_prints_text_and_shares_and_writes_html(world: World) -> None:
    run_id, _ = trained(world, "mode")
    page = world.root / "page.html"
    result = call(world, "generate", run_id[:8], "def f", "--max-tokens", "5", "--gates", "--html", str(page))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def f")
    assert "branches: backbone py sums" in result.stdout
    assert "% of the weight" in result.stdout
    assert page.read_text("utf-8").count("<span") == 5 + 3
    plain = call(world, "generate", run_id[:8], "def f", "--max-tokens", "5")
    assert result.stdout.startswith(plain.stdout)
    sampled = [call(world, "generate", run_id, "d", "--temperature", "1.5", "--seed", seed).stdout for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_an_empty_prompt_starts_a_document(world: World) -> None:
    run_id, _ = trained(world, "sft")
    assert call(world, "generate", run_id, "", "--max-tokens", "3").exit_code == 0


# --- text in, text out


def load(folder: Path, **settings: Any) -> tuple[Any, Any]:
    backbone = Backbone(name="it", path=str(folder), **settings)
    return load_model(backbone).eval(), load_tokenizer(backbone)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("prompt", "continuation"), [("hello", " world"), ("def f():\n", "    return 1\n")])
def test_a_continuation_keeps_its_first_space(tmp_path: Path, prompt: str, continuation: str, bos: bool) -> None:
    write_continuation(tmp_path, prompt, continuation, bos=bos)
    model, tokenizer = load(tmp_path)
    made = list(generate(model, tokenizer, prompt, Sampling(10)))
    assert "".join(piece.text for piece in made) == continuation
    assert list(complete_prompts(model, tokenizer, [prompt], 10, [])) == [(0, continuation)]


def test_the_command_prints_the_text_with_its_spaces(tmp_path: Path) -> None:
    write_continuation(tmp_path, "hello", " world  of words")
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "hello"])
    check_refused(result, "max_tokens", str(CONTEXT), suggestion=str(CONTEXT - 1))  # 100 tokens are the default
    assert result.stdout == ""
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "hello", "--max-tokens", "9"])
    assert (result.exit_code, result.stdout) == (0, "hello world  of words\n")


def test_a_prompt_that_is_not_utf8_is_refused_before_anything_is_printed(tmp_path: Path) -> None:
    write_continuation(tmp_path, "hello", " world")
    for prompt in (os.fsdecode(b"ros\xff e"), "ros\ud800"):
        result = CliRunner().invoke(app, ["generate", str(tmp_path), prompt, "--max-tokens", "3"])
        check_refused(result, "PROMPT", "'ros'", "UTF-8")
        assert result.stdout == ""


def test_a_prompt_in_utf8_that_python_has_read_as_ascii_is_the_same_prompt() -> None:
    assert decode_prompt("é".encode().decode("ascii", "surrogateescape")) == decode_prompt("é") == "é"


@pytest.mark.parametrize("declared", [TURN, [EOS, TURN]])
def test_a_declared_end_of_turn_ends_the_text(tmp_path: Path, declared: Any) -> None:
    tokenizer = make_tokenizer("hello world")
    write_reciter(tmp_path, tokenizer, [tokenizer.token_to_id("▁world"), TURN, TURN])
    assert len(list(generate(*load(tmp_path), "hello", Sampling(9)))) == 9
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}), "utf-8")
    model, loaded = load(tmp_path)
    assert "".join(piece.text for piece in generate(model, loaded, "hello", Sampling(9))) == " world"
    expected = model.generate(torch.tensor(loaded.encode(["hello"])), max_new_tokens=9, do_sample=False)
    assert expected[0, -1] == TURN
    assert expected.shape[1] == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_that_does_not_fit_is_refused_and_never_cut_in_silence(
    tmp_path: Path, world: World, family: str
) -> None:
    if family == "gpt2":
        write_continuation(tmp_path, "hello", " world")
        context, (model, tokenizer) = CONTEXT, load(tmp_path)
    else:
        context, (model, tokenizer) = 256, load(world.conf.parent / "pico")
    word = "hello " if family == "gpt2" else "\n"
    text = word * context
    length = len(tokenizer.encode([text])[0])
    with refused(f"{length} tokens", str(context)):
        next(generate(model, tokenizer, text, Sampling(1)))
    with refused("max_tokens", str(context), suggestion=str(context - 1)):
        next(generate(model, tokenizer, word.strip(" "), Sampling(context)))


def test_a_prompt_that_is_cut_keeps_its_first_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_and_name(tmp_path))
    ids = tokenizer.encode(["a b a b a"])[0]
    assert fit_prompt(tokenizer, "a b a b a", 6, 2, cut=True) == [BOS, *ids[-3:]]
    assert fit_prompt(tokenizer, "a b a b a", 8, 2, cut=True) == ids
    with refused("max_tokens", "6"):
        fit_prompt(tokenizer, "a", 6, 5, cut=True)


def write_and_name(folder: Path) -> Backbone:
    write_reciter(folder, make_tokenizer("a b", bos=True), [EOS])
    return Backbone(name="it", path=str(folder))


@pytest.mark.slow
def test_mistakes_are_told_in_one_line(world: World) -> None:
    run_id, _ = trained(world, "sft")
    for words, named in {
        ("generate", "zzz", "x"): "zzz",
        ("generate", run_id, "x", "--gates"): "gates",
        ("generate", str(world.root), "x"): "config.json",
        ("generate", run_id[:-1] + "~", "x"): f"{run_id}?",
    }.items():
        check_refused(call(world, *words), named)
    with refused("zzz", str(world.root / "runs")):
        find_run("zzz", world.root / "runs")
    (world.root / "runs" / run_id / "run.yaml").unlink()
    with refused(f"{run_id}/run.yaml"):
        find_run(run_id, world.root / "runs")
