"""mode data prepare, mode data show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cli.options import ConfOption, DomainOption, Overrides, told, with_domains

if TYPE_CHECKING:
    from mode.data.pack import Packed
    from mode.domain import Domain

app = typer.Typer(help="Prepare and describe the domains.", no_args_is_help=True)


@app.command("prepare")
def prepare(overrides: Overrides = None, domain: DomainOption = None, conf: ConfOption = None) -> None:
    """Read, split, deduplicate, tokenise and pack the domains.

    Example: mode data prepare --domain code
    """
    with told():
        for packed, _ in packed_domains(overrides or [], domain, conf):
            print(f"{packed.name}: {packed.fingerprint} in {packed.folder}")


@app.command("show")
def show(overrides: Overrides = None, domain: DomainOption = None, conf: ConfOption = None) -> None:
    """Show each domain's documents, tokens, licence, fingerprint, duplicates and overlap.

    Example: mode data show
    """
    with told():
        for packed, settings in packed_domains(overrides or [], domain, conf):
            meta = packed.meta
            print(f"{packed.name}: {settings.description}")
            print(f"  licence      {settings.licence}")
            print(f"  fingerprint  {packed.fingerprint}")
            print(
                f"  duplicates   {meta['exact_duplicates_dropped']:,} exact and "
                f"{meta['near_duplicates_dropped']:,} near ones across splits dropped"
            )
            print(f"  seen         {100 * packed.seen:.1f} % of the test split's 13-token n-grams occur in train")
            print(f"  {'split':<12} {'documents':>10} {'tokens':>12} {'bytes':>12} {'bytes/token':>12}")
            for name, split in meta["splits"].items():
                documents, tokens, size = split["documents"], split["tokens"], split["bytes"]
                print(f"  {name:<12} {documents:>10,} {tokens:>12,} {size:>12,} {size / tokens:>12.2f}")


def packed_domains(overrides: Sequence[str], domain: str | None, conf: Path | None) -> list[tuple[Packed, Domain]]:
    """Prepare the domains named by --domain, or all that the configuration uses."""
    from mode import config
    from mode.runner import prepare_run

    given = with_domains(overrides, domain)
    if domain is not None:
        given.append(given[0].replace("targets", "evaluate.domains"))
    run = config.compose(given, conf)
    packed = prepare_run(run).packed
    return [(packed[name], run.domains[name]) for name in packed]
