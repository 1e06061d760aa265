"""Interrupt a run at random times, again and again: each time it ends, and the end is that of a run left in peace.

`python -m tests.support.interrupts 100` sends 100 signals. Processes are forked from one that has imported everything,
so that most signals arrive while the run does something.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.conftest import World, make_world
from tests.house import imported  # noqa: F401  # before the first fork

LONG = ["train.steps=60", "train.log_every=1", "train.checkpoint_every=5", "train.threads=1"]
SIGNALS = (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = "mode: stopped; the same command continues from the last checkpoint"


def start(words: Sequence[str], log: Path) -> int:
    """Start a command in a forked process, and return the process's id."""
    number = os.fork()
    if number:
        return number
    try:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        sys.argv = ["mode", *words]
        from cli.app import main

        main()
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    except KeyboardInterrupt:  # before the command line handles signals
        os._exit(130)
    finally:
        os._exit(99)


def wait_for(number: int, seconds: float) -> int | None:
    """Return the exit code of a process, or None if it has not ended after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def words_of(world: World, folder: Path) -> list[str]:
    return ["train", "baseline", "sft", *world.at(folder).overrides, *LONG, "--conf", str(world.conf)]


def read_result(folder: Path) -> tuple[object, ...]:
    """Return what must not depend on interrupts: the scores, the curve without times, and the weights."""
    (record,) = (folder / "results" / "records").glob("*.json")
    happened = json.loads(record.read_text("utf-8"))["happened"]
    curve = [{name: value for name, value in point.items() if name != "seconds"} for point in happened["curve"]]
    (weights,) = (folder / "runs").glob("*/weights.safetensors")
    return happened["scores"], curve, weights.read_bytes()


def interrupt_often(root: Path, signals: int, seed: int = 0) -> Counter[str]:
    """Send signals at random times, until a run has ended in spite of them, and begin again; return what happened."""
    torch.set_num_threads(1)  # a forked process would wait for ever for the threads of its parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    world, rng, seen = make_world(root / "world"), random.Random(seed), Counter[str]()
    for name in ("warm", "whole"):  # the first one prepares the data
        begin = time.monotonic()
        assert wait_for(start(words_of(world, root / name), root / "log"), 600) == 0, (root / "log").read_text("utf-8")
    length, expected, runs = time.monotonic() - begin, read_result(root / "whole"), 0
    while seen.total() < signals:
        folder = root / f"run-{runs}"
        runs += 1
        for _ in range(4):
            number, sent = start(words_of(world, folder), root / "log"), rng.choice(SIGNALS)
            code = wait_for(number, rng.uniform(0, length))
            if code is None:
                os.kill(number, sent)
                begin = time.monotonic()
                code = wait_for(number, 30)
                if code is None:
                    os.kill(number, signal.SIGUSR1)  # where is it?
                    time.sleep(1)
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
                text = (root / "log").read_text("utf-8")
                done = any((folder / "results").rglob("*.json"))
                fine = code == 130 and text.endswith(f"{STOPPED}\n")
                late = done and code in (0, -signal.SIGINT, -sent)  # the run was over
                early = not text and code in (-sent, 130)  # nothing had begun
                kind = "stopped" if fine else "early" if early else "late" if late else "wrong"
                seen[kind] += 1
                print(f"{sent.name} {kind} {code} after {time.monotonic() - begin:.2f} s", flush=True)
                if kind == "wrong":
                    print(text, flush=True)
        assert wait_for(start(words_of(world, folder), root / "log"), 200) == 0, (root / "log").read_text("utf-8")
        same = read_result(folder) == expected
        seen["differs"] += not same
        print("resumed, the same" if same else "resumed, DIFFERS", flush=True)
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        result = interrupt_often(Path(place), int(sys.argv[1]))
    print(dict(result))
    sys.exit(int(bool(result["wrong"] or result["differs"])))
