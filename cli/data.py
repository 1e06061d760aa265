"""Commands `mode data prepare` and `mode data show`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.options import ConfOption, DomainOption, Overrides, add_domains, reporting_errors

if TYPE_CHECKING:
    from mode.config.data import Domain
    from mode.data.pack import Packed

app = typer.Typer(help="Prepare and describe the domains.", no_args_is_help=True)


@app.command("prepare")
def prepare(overrides: Overrides = None, domain: DomainOption = None, conf: ConfOption = None) -> None:
    """Read, split, deduplicate, tokenise and pack the domains.

    Example: mode data prepare --domain code
    """
    with reporting_errors():
        for packed, _ in prepare_domains(overrides or [], domain, conf)[0]:
            print(f"{packed.name}: {packed.fingerprint} in {packed.folder}")


@app.command("show")
def show(overrides: Overrides = None, domain: DomainOption = None, conf: ConfOption = None) -> None:
    """Show documents, tokens, licence, fingerprint, duplicates and overlap of every domain.

    Example: mode data show
    """
    with reporting_errors():
        from mode.data.contamination import measure_contamination
        from mode.data.pack import describe_small_splits

        domains, pretraining = prepare_domains(overrides or [], domain, conf)
        overlap = measure_contamination({packed.name: packed for packed, _ in domains}, "test", pretraining)
        for packed, settings in domains:
            meta = packed.meta
            print(f"{packed.name}: {settings.description}")
            print(f"  licence      {settings.licence}")
            print(f"  fingerprint  {packed.fingerprint}")
            print(
                f"  duplicates   {meta['exact_duplicates_dropped']:,} exact and "
                f"{meta['near_duplicates_dropped']:,} near ones across splits dropped"
            )
            shares = [f"{name} {format_percent(value)}" for name, value in overlap[packed.name].items()]
            print(f"  seen         of the test split's 13-token n-grams in training: {', '.join(shares)}")
            print(f"  {'split':<12} {'documents':>10} {'tokens':>12} {'bytes':>12} {'bytes/token':>12}")
            for name, split in meta["splits"].items():
                documents, tokens, size = split["documents"], split["tokens"], split["bytes"]
                print(f"  {name:<12} {documents:>10,} {tokens:>12,} {size:>12,} {size / tokens:>12.2f}")
            for warning in describe_small_splits(packed):
                print(f"mode: warning: {warning}", file=sys.stderr)


def format_percent(share: float | None) -> str:
    """Render a share in per cent.

    >>> format_percent(0.1234), format_percent(None)
    ('12.3 %', 'not known')
    """
    return "not known" if share is None else f"{100 * share:.1f} %"


def prepare_domains(
    overrides: Sequence[str], domain: str | None, conf: Path | None
) -> tuple[list[tuple[Packed, Domain]], dict[str, str]]:
    """Prepare the domains of --domain, or all domains; return them, and fingerprints of the pretraining data."""
    from mode.config.compose import compose
    from mode.runs.prepare import prepare_run

    given = add_domains(overrides, domain)
    if domain is not None:
        given.append(given[0].replace("targets", "evaluate.domains"))
    run = compose(given, conf)
    prepared = prepare_run(run)
    domains = [(packed, run.domains[name]) for name, packed in prepared.packed.items()]
    return domains, prepared.method.pretraining_data(run)
