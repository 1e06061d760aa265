"""Run the campaign: `python -m tests.campaign`; see --help."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path

from tests.campaign import calls
from tests.campaign.place import Place
from tests.campaign.trials import ROOT, Kind, Results, Trial, UnavailableError, digest_code, format_table, run_trials

MODULES = ("kills", "artefacts", "command_lines", "yamls", "sandbox", "full_disk", "concurrent")
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- campaign -->\n", "\n<!-- end -->"


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of all trials")
    parser.add_argument("--only", metavar="KIND[/NUMBER]", help=f"one kind or trial; kinds: {', '.join(MODULES)}")
    parser.add_argument("--count", type=int, metavar="N", help="at most N trials of a kind")
    parser.add_argument("--again", action="store_true", help="forget the results of these trials")
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.relative_to(ROOT)}")
    parser.add_argument("--folder", type=Path, default=Path(".campaign"), help="results and temporary files")
    return parser.parse_args()


def prepare_process() -> None:
    """Set what commands need, and import everything that they import, before the first fork."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200", "TERM": "dumb"}
    import torch

    torch.set_num_threads(1)
    for name in ("tests.house.imported", "tests.conftest", "cli.app", "mode.config.compose", "mode.report.page"):
        import_module(name)


def choose_trials(kind: Kind, place: Place, options: argparse.Namespace, number: str) -> dict[str, Trial] | str:
    """Return the trials of a kind by key, or the reason why this machine cannot make them."""
    try:
        trials = kind.make_trials(place, options.seed)
    except UnavailableError as error:
        return str(error)
    name = kind.make_trials.__module__.rpartition(".")[2]
    found = {f"{name}/{index}": trial for index, trial in enumerate(trials)}
    if number:
        return {key: trial for key, trial in found.items() if key == f"{name}/{number}"}
    return dict(list(found.items())[: options.count])


def main() -> int:
    """Run the campaign; return 1 if there is a fault."""
    options = parse_arguments()
    only, _, number = (options.only or "").partition("/")
    if only and only not in MODULES:
        print(f"--only {only}: not one of {', '.join(MODULES)}", file=sys.stderr)
        return 2
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"{folder}: another campaign is running", file=sys.stderr)
        return 2
    if not calls.is_loaded() and (library := calls.build_library(folder)) is not None:
        calls.preload(library)
    prepare_process()
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    place, results = Place(work), Results(folder / "results.jsonl", digest_code())
    kinds = [import_module(f"tests.campaign.{name}").KIND for name in MODULES if only in ("", name)]
    chosen: dict[str, dict[str, Trial] | str] = {}
    for kind in kinds:
        begin = time.monotonic()
        chosen[kind.name] = trials = choose_trials(kind, place, options, number)
        if isinstance(trials, dict):
            if options.again:
                results.forget(options.seed, trials)
            run_trials(trials, results, options.seed, work)
            print(f"{kind.name}: {len(trials)} trials, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(work)
    keys = {name: trials if isinstance(trials, str) else list(trials) for name, trials in chosen.items()}
    table = format_table(kinds, results, options.seed, keys)
    print(table)
    if options.write:
        head, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(head + BEGIN + table + END + rest.split(END)[1], "utf-8")
    made = [key for group in keys.values() if not isinstance(group, str) for key in group]
    return int(any(results.found[options.seed, key]["fault"] is not None for key in made))


if __name__ == "__main__":
    sys.exit(main())
