"""Mutated YAML files in a folder of configuration, made with hypothesis."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.campaign.artefacts import list_leaves, pick
from tests.campaign.command_lines import MEMORY, SECONDS, VALUES, find_line_fault, sample
from tests.campaign.place import Place
from tests.campaign.processes import run_mode
from tests.campaign.trials import Kind, Trial, draw

COUNT = 420
FILES = {
    "domain/py": ["show domains", "data show --domain py", "show config"],
    "backbone/pico": ["show backbones", "show config", "data show"],
    "table/tiny": ["show tables", "report tiny", "show budget tiny"],
    "experiment/mine": ["show config experiment=mine", "train baseline sft experiment=mine --print-config"],
    "method/mine": ["show methods", "train baseline mine --print-config"],
    "budget/mine": ["show config budget=mine", "show budget tiny budget=mine"],
    "track/mine": ["show config track=mine"],
    "device/mine": ["plan --device mine"],
    "link/mine": ["plan --link mine"],
}
"""Commands that read a file."""

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = (
    *(
        "",
        " ",
        "null",
        "[]",
        "{}",
        "3",
        "text",
        "- a",
        "---\n---\n",
        "a: 1\n---\nb: 2\n",
        "...",
        "\ufeff",
        "\t",
        "a:\tb",
    ),
    *("a: &a [*a]", "a: &a {b: *a}", "<<: *a", "a: *a", BOMB, "[" * 5000, "{a: " * 3000, "- " * 5000, "? " * 500),
    *(
        "!!python/object:os.system 1",
        "!!python/name:os.system",
        "!!binary x",
        "!!set {a}",
        "!!timestamp x",
        "%YAML 9.9",
    ),
    *("a: 1\na: 2", "1: 2", "null: 1", "true: 1", "? [a, b]\n: c", "a: 'b", 'a: "\\x"', "a: |\n b", "defaults: [a]"),
    *("defaults: 3", "defaults: [mine]", "defaults: [/method/mine]", "_target_: os.getcwd", "_target_: 3", "_self_: 1"),
    *("# @package nothing", "# @package _global_\nseed: x", "a: ${a}", "a: ${b}\nb: ${a}", "a: ${oc.env:NO}", "a: ???"),
    *("a: .nan", "a: .inf", "a: 1e999", "a: 2020-13-45", "a: 0o9", "a: " + "9" * 5000, "x" * 100_000 + ": 1", "\0"),
)


def make_files(conf: Path) -> None:
    """Write the files that are mutated, beside those of the world."""
    own = Path(__file__).parents[2] / "conf"
    shutil.copy(own / "budget" / "data.yaml", make(conf / "budget") / "mine.yaml")
    shutil.copy(own / "track" / "none.yaml", make(conf / "track") / "mine.yaml")
    shutil.copy(own / "method" / "lora.yaml", make(conf / "method") / "mine.yaml")
    shutil.copy(own / "device" / "h100.yaml", make(conf / "device") / "mine.yaml")
    shutil.copy(own / "link" / "nvlink.yaml", make(conf / "link") / "mine.yaml")
    (make(conf / "experiment") / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: sft\ntargets: [py]\ntrain:\n  steps: 2\n", "utf-8"
    )


def make(folder: Path) -> Path:
    """Make a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_strategy() -> Any:
    """Return a strategy: a file, a command that reads it, and a mutation."""
    from hypothesis import strategies as st

    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), sample(VALUES)
    )
    leaf = leaf.filter(lambda value: not isinstance(value, str) or not value.startswith(("/", "~", "..")))
    value = st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | leaf, inner, max_size=3),
        max_leaves=6,
    )
    part = st.floats(0, 1, exclude_max=True)
    mutation = st.one_of(
        st.tuples(st.just("value"), part, value),
        st.tuples(st.just("value"), part, value),
        st.tuples(st.just("key"), part, leaf),
        st.tuples(st.just("drop"), part, st.none()),
        st.tuples(st.just("text"), part, sample(TEXTS)),
        st.tuples(st.just("whole"), part, sample(TEXTS)),
        st.tuples(st.just("bytes"), part, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("cut"), part, part),
    )
    reads = [(name, command) for name, commands in FILES.items() for command in commands]
    return st.tuples(st.sampled_from(reads), mutation)


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return trials of mutated files."""
    place.world  # noqa: B018  # made before the trials are forked
    trials = []
    for (name, command), mutation in draw(make_strategy(), COUNT, seed):
        shown = f"{name}.yaml, {mutation[0]} at {mutation[1]:.3f} {mutation[2]!a}; mode {command}"
        trials.append(Trial(shown[:300], partial(attempt, place, name, command.split(), mutation)))
    return trials


def attempt(
    place: Place, name: str, words: Sequence[str], mutation: tuple[str, float, Any], folder: Path
) -> str | None:
    """Mutate a file of a copy of the configuration, and run a command that reads it."""
    conf = folder / "conf"
    shutil.copytree(place.world.conf, conf)
    make_files(conf)
    path = conf / f"{name}.yaml"
    path.write_bytes(mutate(path.read_bytes(), *mutation))
    settings = place.settings(folder)[:-1]
    keys = {word.partition("=")[0] for word in words}
    settings = [word for word in settings if word.partition("=")[0] not in keys]
    if words[0] == "show" and words[1] not in ("config", "budget"):
        settings = ["--conf"]
    return find_line_fault(run_mode([*words, *settings, str(conf)], folder, seconds=SECONDS, memory=MEMORY))


def mutate(data: bytes, name: str, where: float, extra: Any) -> bytes:
    """Return the bytes of a mutated file."""
    at = int(where * (len(data) + 1))
    if name == "text":
        return data[:at] + encode(extra) + data[at:]
    if name == "whole":
        return encode(extra)
    if name == "bytes":
        return data[:at] + bytes(extra) + data[at + 1 :]
    if name == "cut":
        return data[:at] + data[at + int(extra * (len(data) - at)) + 1 :]
    tree = yaml.safe_load(data)
    *path, last = pick(list_leaves(tree), where)
    holder = tree
    for key in path:
        holder = holder[key]
    value = holder[last] if name == "key" else extra
    if name == "drop" or (name == "key" and isinstance(holder, dict)):
        del holder[last]
    if name == "key" and isinstance(holder, dict):
        holder[extra] = value
    elif name != "drop":
        holder[last] = extra
    first = data.splitlines()[0]
    head = first + b"\n" if first.startswith(b"# @package") else b""
    return head + encode(yaml.safe_dump(tree, allow_unicode=True))


def encode(text: str) -> bytes:
    """Return a text as UTF-8; half characters become bytes that are none."""
    return text.encode("utf-8", "surrogatepass")


KIND = Kind("YAML files", "a traceback, no end, another exit code than 0, 1, 2, or not one line", make_trials)
