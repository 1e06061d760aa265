"""Damaged artefacts: a file of a run, of the cache or of a model is damaged, then a command reads it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.campaign import calls
from tests.campaign.place import Place, copy_state, find_difference
from tests.campaign.processes import find_fault, find_refusal_fault, last_line, run_mode
from tests.campaign.trials import Kind, Trial, UnavailableError, draw

COUNT = 720
DAMAGES = ("flip", "flip", "cut", "empty", "zero", "swap", "append", "retype", "drop", "reshape", "remove")
DIFFERS = "accuracies differ from the record's"
"""What `mode eval` says of weights that give another result than their record has."""


DTYPES = {"<f4": "<f8", "<f8": "<f4", "<i8": "<i4", "<i4": "<i8", "<u2": "<u4"}


@dataclass(frozen=True)
class Reader:
    """A command that reads artefacts.

    Attributes:
        name: What is read, for people.
        start: Folder of the artefacts when they are whole.
        files: Patterns of the files, below the folder.
        words: The command, for a folder.
        removed: Patterns of files that are removed first, so that the command reads the artefacts again.
        trained: Folder of the same runs undisturbed, if the command trains; else what is printed is compared.
    """

    name: str
    start: Path
    files: Sequence[str]
    words: Callable[[Path], list[str]]
    removed: Sequence[str] = ()
    trained: Path | None = None


def list_readers(place: Place) -> list[Reader]:
    """Return the commands, each with the files that it reads."""
    whole, interrupted = place.whole, place.interrupted
    mode, experts = place.run_id("mode"), ["runs/*/expert/expert.json", "runs/*/expert/model.safetensors"]
    trained, packed = place.root / "counted", ["cache/packed/*/*"]
    once = [f"runs/{mode}", "results/records/mode-py-sums-*"]
    model = ["exported/*.json", "exported/*.safetensors"]
    weights = [f"runs/{mode}/weights.safetensors", f"runs/{mode}/run.yaml"]
    state = ["runs/*/checkpoint-*/*", "runs/*/checkpoint-*/*", "runs/*/curve.jsonl"]

    def with_settings(*words: str) -> Callable[[Path], list[str]]:
        return lambda folder: [*words, *place.settings(folder)]

    def with_paths(*words: str) -> Callable[[Path], list[str]]:
        return lambda folder: [word.replace("FOLDER", str(folder)) for word in words] + place.paths(folder)

    return [
        Reader("a checkpoint, resumed", interrupted, state, place.train, trained=trained),
        Reader("experts, resumed", interrupted, experts, place.train, trained=trained),
        Reader("packed data, resumed", interrupted, packed, place.train, trained=trained),
        Reader("experts, composed", whole, experts, with_settings("compose", "py", "sums"), once, trained),
        Reader("an expert, shown", whole, experts, with_paths("expert", "show", "FOLDER/runs/PY/expert")),
        Reader("weights, scored", whole, weights, with_settings("eval", "method=mode")),
        Reader("packed data, scored", whole, packed, with_settings("eval", "method=mode")),
        Reader("packed data, described", whole, packed, with_settings("data", "show")),
        Reader("weights, generating", whole, weights, with_paths("generate", mode, "def f", "--gates")),
        Reader(
            "a model, generating", place.exported, model, with_paths("generate", "FOLDER/exported", "def f", "--gates")
        ),
        Reader("records, in a table", whole, ["results/records/*"], place.report),
        Reader("records, checked", whole, ["results/records/*"], lambda folder: [*place.report(folder), "--check"]),
        Reader("records, listed", whole, ["results/records/*"], with_paths("show", "runs")),
        Reader("records, retention", whole, ["results/records/*"], with_settings("eval", "--retention")),
        Reader("a record, trained", whole, ["results/records/mode-py-sums-*"], place.train, trained=trained),
    ]


def make_trials(place: Place, seed: int) -> list[Trial]:
    """Return trials of all readers with damage drawn by hypothesis."""
    if not calls.is_loaded():
        raise UnavailableError("needs Linux and a C compiler, to interrupt a run between two checkpoints")
    from hypothesis import strategies as st

    readers = list_readers(place)
    expected = {reader.name: read_expected(place, reader) for reader in readers if reader.trained is None}
    part = st.floats(0, 1, exclude_max=True)
    drawn = draw(st.tuples(st.sampled_from(readers), part, st.sampled_from(DAMAGES), part, part), COUNT, seed)
    trials = []
    for reader, file, drawn_damage, where, amount in drawn:
        path = pick(list_files(reader), file)
        gone = drawn_damage == "remove" and path.parent.name == "records"  # a folder with fewer records is whole
        damage = "empty" if gone else drawn_damage
        name = f"{reader.name}: {damage} at {where:.3f} of {path.relative_to(reader.start)}"
        trials.append(
            Trial(name, partial(attempt, place, reader, path, damage, where, amount, expected.get(reader.name, "")))
        )
    return trials


def list_files(reader: Reader) -> list[Path]:
    """Return the files of a reader; a pattern that is given twice gives its files twice."""
    found = [path for pattern in reader.files for path in sorted(reader.start.glob(pattern))]
    files = [path for path in found if path.is_file() and path.name != "lock"]
    if not files:
        raise RuntimeError(f"{reader.name}: no file matches {reader.files}")
    return files


def pick(items: Sequence[Any], part: float) -> Any:
    """Return the item at a part of a sequence."""
    return items[int(part * len(items))]


def make_state(reader: Reader, folder: Path) -> None:
    """Copy the artefacts of a reader into a folder."""
    copy_state(reader.start, folder)
    if (reader.start / "exported").exists():
        shutil.copytree(reader.start / "exported", folder / "exported")
    for pattern in reader.removed:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def list_words(reader: Reader, path: Path, folder: Path) -> list[str]:
    """Return the command of a reader, about the run that a file belongs to."""
    run = path.relative_to(reader.start).parts[1]
    return [word.replace("/PY/", f"/{run}/") for word in reader.words(folder)]


def read_expected(place: Place, reader: Reader) -> dict[str, str]:
    """Return what a command prints about whole artefacts, by its words."""
    folder = place.root / f"read-{reader.name.replace(' ', '-').replace(',', '')}"
    folder.mkdir()
    make_state(reader, folder)
    printed: dict[str, str] = {}
    for path in list_files(reader):
        words = list_words(reader, path, folder)
        key = " ".join(words).replace(str(folder), "")
        if key not in printed:
            printed[key] = place.make(words, folder).out.replace(str(folder), "")
    return printed


def attempt(
    place: Place,
    reader: Reader,
    path: Path,
    damage: str,
    where: float,
    amount: float,
    expected: Mapping[str, str],
    folder: Path,
) -> str | None:
    """Damage a file and run the command that reads it."""
    make_state(reader, folder)
    here = folder / path.relative_to(reader.start)
    apply_damage(here, folder, damage, where, amount)
    words = list_words(reader, path, folder)
    ended = run_mode(words, folder)
    if fault := find_fault(ended):
        return fault
    if ended.code:
        is_record = here.parent.name == "records"
        about = here.stem.rpartition("-")[2] if is_record else "/".join(here.parent.parts[-2:])
        return find_refusal_fault(ended, [here.name, about])
    if reader.trained is not None:
        difference = find_difference(folder, reader.trained) if reader.start != place.whole else None
        difference = difference or find_changed(folder, reader.trained)
        return difference and f"damage without a word: {difference}; {last_line(ended.err)}"
    printed = ended.out.replace(str(folder), "")
    wanted = expected[" ".join(words).replace(str(folder), "")]
    if printed != wanted and DIFFERS not in printed:
        pairs = zip([*printed.splitlines(), ""], [*wanted.splitlines(), ""], strict=False)
        line = next((line for line, other in pairs if line != other), "fewer lines")
        return f"damage without a word: prints {line.strip()[:200]}"
    return None


def find_changed(folder: Path, trained: Path) -> str | None:
    """Return a record of the undisturbed runs whose scores another folder has otherwise."""
    for path in sorted((trained / "results" / "records").glob("*.json")):
        other = folder / "results" / "records" / path.name
        if not other.exists():
            return f"{path.name} is missing"
        ours, theirs = (json.loads(each.read_text("utf-8"))["happened"]["scores"] for each in (other, path))
        if ours != theirs:
            return f"{path.name} has other scores"
    return None


def apply_damage(path: Path, folder: Path, damage: str, where: float, amount: float) -> None:
    """Damage a file: its bytes, or its contents in its own format. The file is another one afterwards."""
    before = path.read_bytes()
    if damage == "remove":
        path.unlink()
        return
    if damage == "swap":
        others = sorted(other for other in folder.rglob(path.name) if other.read_bytes() != before)
        others = others or sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
        after = pick(others, where).read_bytes() if others else b""
    elif damage in ("retype", "drop", "reshape"):
        after = change_contents(path, before, damage, where)
    else:
        after = change_bytes(before, damage, where, amount)
    path.write_bytes(after if after != before else change_bytes(before, "flip", where, amount))


def change_bytes(data: bytes, damage: str, where: float, amount: float) -> bytes:
    """Return damaged bytes."""
    at, end = int(where * len(data)), int((where + amount * (1 - where)) * len(data)) + 1
    if damage == "cut":
        return data[:at]
    if damage == "empty":
        return b""
    if damage == "zero":
        return data[:at] + bytes(len(data[at:end])) + data[end:]
    if damage == "append":
        return data + data[at:end]
    return data[:at] + bytes(byte ^ 1 << int(amount * 8) for byte in data[at : at + 1]) + data[at + 1 :]


def change_contents(path: Path, data: bytes, damage: str, where: float) -> bytes:
    """Return the bytes of other contents in the same format."""
    if path.suffix == ".safetensors":
        return change_tensors(data, damage, where)
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, change_array(np.load(io.BytesIO(data)), damage))
        return buffer.getvalue()
    if path.suffix == ".bin":
        return change_array(np.frombuffer(data, "<u2"), damage).tobytes()
    if path.suffix == ".jsonl":
        lines = data.decode().splitlines()
        number = int(where * len(lines))
        lines[number : number + 1] = [] if damage == "drop" else [json.dumps(change_tree(json.loads(lines[number])))]
        return "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".json":
        return json.dumps(change_leaf(json.loads(data), damage, where), indent=1).encode()
    if path.suffix == ".yaml":
        return yaml.safe_dump(change_leaf(yaml.safe_load(data), damage, where)).encode()
    return b""


def change_array(array: Any, damage: str) -> Any:
    """Return an array of another type or shape."""
    if damage == "retype":
        return array.astype(DTYPES[array.dtype.str])
    return array[:-1] if damage == "drop" else array[::-1]


def change_tensors(data: bytes, damage: str, where: float) -> bytes:
    """Return the bytes of other tensors: of one the type is changed or the order of its values, or it is left out."""
    from safetensors.numpy import load, save

    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length]).get("__metadata__")
    name = pick(sorted(tensors), where)
    if damage == "drop":
        del tensors[name]
    else:
        tensors[name] = np.ascontiguousarray(change_array(tensors[name], damage))
    return save(tensors, metadata=about)


def list_leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [leaf for key, value in items for leaf in list_leaves(value, (*path, key))]


def change_leaf(tree: Any, damage: str, where: float) -> Any:
    """Return a tree in which one value is of another type, or left out, or another value."""
    leaves = list_leaves(tree)
    if not leaves:
        return [tree]
    *path, last = pick(leaves, where)
    holder = tree
    for key in path:
        holder = holder[key]
    if damage == "drop":
        del holder[last]
    elif damage == "retype":
        holder[last] = change_tree(holder[last])
    else:
        value = holder[last]
        holder[last] = value + 1 if isinstance(value, int | float) else [value]
    return tree


def change_tree(value: Any) -> Any:
    """Return a value as one of another type."""
    return {"value": value} if isinstance(value, str) else str(value)


KIND = Kind(
    "artefacts",
    "a traceback, no end, a refusal that does not name the file, or another result without a word",
    make_trials,
)
