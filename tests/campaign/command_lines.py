"""Mutated command lines, made with hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.campaign.place import Place, copy_state
from tests.campaign.processes import Ended, find_fault, last_line, run_mode
from tests.campaign.trials import Kind, Trial, draw

COUNT = 620
SECONDS = 10
"""Limit of the processor time of a command."""


MEMORY = 8 << 30
"""Limit of the address space of a command, in bytes."""


COMMANDS = (
    "show methods",
    "show domains",
    "show backbones",
    "show tables",
    "show runs",
    "show config",
    "show config -d py,sums",
    "show budget tiny",
    "train baseline sft --print-config",
    "train baseline lora method.rank=2 --print-config",
    "train baseline mode-anchored --domain py --print-config --again",
    "train expert --domain py --print-config",
    "train backbone --print-config",
    "train baseline sft --sweep seed=0,1 --print-config",
    "compose py sums --frozen --print-config",
    "compose py sums --uninitialized --print-config",
    "report tiny",
    "report tiny --metric loss",
    "report tiny --check",
    "report tiny --html",
    "data show",
    "data show --domain py",
    "data prepare",
    "eval --retention",
    "eval --retention --metric loss",
    "eval method=sft",
    "eval --downstream --task gsm8k --limit 1 method=nothing",
    "expert show RUN",
    "generate RUN text --max-tokens 2",
    "generate RUN text --temperature 0.5 --top-p 0.5 --seed 3 --max-tokens 2",
    "export RUN new --precision bf16 --experts py",
    "analyze gates RUN",
    "plan --devices 4 --device h100 --link nvlink",
    "train baseline sft train.steps=1",
)
GROUPS = ("method", "backbone", "domain", "targets", "experiment", "budget", "evaluate.domains", "x.y")
OPTIONS = (
    *("--again", "--sweep", "--print-config", "--frozen", "--uninitialized", "--check", "--html", "--wandb", "-h"),
    *("--metric", "--domain", "-d", "--task", "--limit", "--ratio", "--max-tokens", "--top-p", "--seed", "--experts"),
    *("--merge", "--precision", "--layout", "--retention", "--downstream", "--nothing", "--", "-", "-x", "--conf"),
)
VALUES = (
    *("", "null", "true", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e999", "1e-400", "9" * 400, "0x10", "1_000"),
    *("[]", "{}", "[", "}", "[1,", "{a:", "[[[[1]]]]", "{a: {b: {c: 1}}}", "a,b", ",", "'", '"', "\\", "#", "%", "&a"),
    *("*a", "!!int 3", "${seed}", "${nothing}", "${oc.env:NOTHING}", "${", "$", "???", "~", "a=b", "=", "py,py"),
    *("\u00e9", "\u202e", "\U0001f600", "\ud800", "\udcff", "\t", "\n", "a\nb", "\r", "\x1b[31m", " ", "a" * 5000),
    *("[" * 2000, "choice(1,2)", "range(1,5)", "glob(*)", "shuffle(1,2)", "int(1)", "sort(3,1)", "tag(a,1)"),
)


def list_keys(place: Place) -> list[str]:
    """Return the keys of all settings but paths, which stay below the folder of the trial."""
    import yaml

    shown = place.make(["show", "config", "--conf", str(place.world.conf)], place.root).out

    def flatten(tree: Any, path: str) -> list[str]:
        items = tree.items() if isinstance(tree, dict) else ()
        return [path] * bool(path) + [
            key for name, value in items for key in flatten(value, f"{path}.{name}".strip("."))
        ]

    return [key for key in flatten(yaml.safe_load(shown), "") if not key.startswith(("paths", "track"))]


def make_strategy(keys: Sequence[str]) -> Any:
    """Return a strategy of mutated command lines, as words."""
    from hypothesis import strategies as st

    characters = st.characters(exclude_categories=[], exclude_characters="/~\0.")
    text = st.text(characters, max_size=8)
    odd = sample(VALUES)
    value = st.one_of(odd, odd, odd, st.integers().map(str), st.floats().map(str), text)
    key = st.sampled_from([*keys, *GROUPS * 5])
    prefix = st.sampled_from(["", "", "", "", "+", "++", "~"])
    setting = st.builds("{}{}={}".format, prefix, key, value)
    word = st.one_of(value, st.sampled_from(OPTIONS), key, setting)
    place = st.integers(0, 20)
    add = st.tuples(st.just("add"), place, setting)
    mutation = st.one_of(
        *[add] * 5,
        st.tuples(st.just("insert"), place, word),
        st.tuples(st.just("replace"), place, word),
        st.tuples(st.just("splice"), place, st.tuples(place, value)),
        st.tuples(st.sampled_from(["drop", "repeat", "turn", "cut"]), place, place),
    )
    return st.tuples(st.sampled_from(COMMANDS), st.lists(mutation, min_size=1, max_size=3)).map(mutate)


def sample(texts: Sequence[str]) -> Any:
    """Return a strategy of some texts, whose name is short although the texts are long."""
    from hypothesis import strategies as st

    return st.integers(0, len(texts) - 1).map(lambda number: texts[number])


def mutate(drawn: tuple[str, list[tuple[str, int, Any]]]) -> list[str]:
    """Apply mutations to the words of a command; nine times of ten to its options and settings only."""
    words = drawn[0].split()
    kept = next((at for at, word in enumerate(words) if "=" in word or word.startswith("-")), len(words))
    whole = drawn[1][0][1] % 10 == 0
    head, words = ([], words) if whole else (words[:kept], words[kept:])
    for name, place, extra in drawn[1]:
        at = place % (len(words) + 1)
        word = words[at] if at < len(words) else ""
        if name == "add":
            words.append(extra)
        elif name == "insert":
            words.insert(at, extra)
        elif name == "replace":
            words[at : at + 1] = [extra]
        elif name == "splice":
            cut = extra[0] % (len(word) + 1)
            words[at : at + 1] = [word[:cut] + extra[1] + word[cut:]]
        elif name == "drop":
            del words[at : at + 1]
        elif name == "repeat":
            words[at:at] = words[at : at + 1]
        elif name == "turn":
            words[at : at + 2] = reversed(words[at : at + 2])
        else:
            words[at : at + 1] = [word[: extra % (len(word) + 1)]]
    return head + words


FORBIDDEN = ("reproduce", "bench", "launch", "sync", "prune", "--calibrate", "--install", "--show-completion")
"""Words that start other processes, use the network or change the machine."""


def is_harmless(words: Sequence[str]) -> bool:
    """Return whether a command line neither starts processes, nor writes outside of its folder, nor takes minutes."""
    if "report" in words[:1] and "tiny" not in words[1:2]:  # all tables of the project
        return False
    return not any(word.startswith(FORBIDDEN) or word.strip().startswith(("/", "~/", "..")) for word in words)


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return trials of mutated command lines."""
    place.whole  # noqa: B018  # made before the trials are forked
    run = place.run_id("mode")
    drawn = draw(make_strategy(list_keys(place)).filter(is_harmless), COUNT, seed)
    lines = [[run if word == "RUN" else word for word in words] for words in drawn]
    return [Trial(f"mode {' '.join(map(ascii, words))}"[:300], partial(attempt, place, words)) for words in lines]


def add_settings(place: Place, words: Sequence[str], folder: Path) -> list[str]:
    """Return a command line with the settings of the world, except those that it has itself."""
    keys = {word.lstrip("+~").partition("=")[0] for word in words}
    if {"-d", "--domain"} & keys:
        keys |= {"targets", "evaluate.domains"}
    settings = [word for word in place.settings(folder) if word.partition("=")[0] not in keys]
    takes_conf = not (words[:1] == ["show"] and words[1:2] != ["runs"] and words[1:2] != ["config"])
    settings = settings if takes_conf else settings[-2:]
    end = words.index("--") if "--" in words else len(words)  # what follows is no option
    return [*words[:end], *settings, *words[end:]]


def attempt(place: Place, words: Sequence[str], folder: Path) -> str | None:
    """Run a mutated command line on finished runs."""
    copy_state(place.whole, folder)
    return find_line_fault(run_mode(add_settings(place, words, folder), folder, seconds=SECONDS, memory=MEMORY))


def find_line_fault(ended: Ended) -> str | None:
    """Return what is wrong with a command on mutated input.

    A command that trains or generates may reach the limit of time: the input may ask for many steps or tokens.
    """
    if ended.code is None:
        return None if " steps" in ended.err or ended.out else find_fault(ended)
    if fault := find_fault(ended):
        return fault
    lines = ended.err.strip().split("\n")
    if ended.code == 2 and not ended.err.startswith("Usage:") and not lines[-1].startswith("mode: "):
        return f"the message is not one line: {last_line(ended.err)}"
    return None


KIND = Kind("command lines", "a traceback, no end, another exit code than 0, 1, 2, or not one line", make_trials)
