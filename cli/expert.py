"""Commands `mode expert show`, `add` and `remove`, and `mode export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.options import ConfOption, Overrides, find_runs_folder, reporting_errors

if TYPE_CHECKING:
    from mode.artefacts.find import FoundModel

app = typer.Typer(help="Show experts, add them to a composed model, or remove them.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run or its start, or folder of a model.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder to write.")]
EmbedOption = Annotated[bool, typer.Option("--embed", help="Include the backbone's weights in the folder.")]


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="EXPERT", help="Folder of an expert, or id or folder of a run.")],
    overrides: Overrides = None,
    conf: ConfOption = None,
) -> None:
    """Show an expert, or list the experts of a composed model.

    The weights of an expert are checked.

    Example: mode expert show runs/3f2a90c1d2e4/expert
    """
    with reporting_errors():
        from mode.artefacts.find import find_expert_folder, find_model, list_branches
        from mode.core.errors import ConfigError
        from mode.modular.artefact import load_experts

        runs = find_runs_folder(overrides, conf)
        if any(path.name.startswith(name) and not (path / "expert").exists() for path in runs.glob("*")):
            source = find_model(name, runs)
            config = source.model.config
            if not list_branches(source):
                raise ConfigError(f"{name}: neither an expert nor a model with experts")
            print(f"a modular model on {config.backbone.get('name', 'an unnamed backbone')}: ", end="")
            print(f"{config.num_blocks} blocks, {config.expert_layers} layers per expert and block")
            print("\n".join(f"  {expert}" for expert in config.experts))
            return
        folder = find_expert_folder(name, runs, ())
        for domain, expert in load_experts(folder).items():
            print(f"expert for {domain}: {folder}")
            for key in sorted(expert.about):
                if key != "domain":
                    print(f"  {key:<22} {expert.about[key]}")


@app.command("add")
def add(
    run: Model,
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="Folder of an expert, or id or folder of a run.")],
    folder: Folder,
    overrides: Overrides = None,
    embed: EmbedOption = False,
    conf: ConfOption = None,
) -> None:
    """Add an expert to a composed model, without training.

    The weight ratios of the other experts do not change.

    Example: mode expert add 3f2a90c1d2e4 ~/experts/law with-law
    """
    with reporting_errors():
        from mode.artefacts.edit import join_experts
        from mode.artefacts.find import find_expert_folder, find_model
        from mode.artefacts.write import check_vacant

        runs = find_runs_folder(overrides, conf)
        check_vacant(folder)
        place = find_expert_folder(expert, runs, ())
        source = find_model(run, runs)
        write(join_experts(source, place), source, folder, embed=embed)


@app.command("remove")
def remove(
    run: Model,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="Expert to remove.")],
    folder: Folder,
    overrides: Overrides = None,
    embed: EmbedOption = False,
    conf: ConfOption = None,
) -> None:
    """Remove an expert of a composed model, without training.

    The weight ratios of the other experts do not change.

    Example: mode expert remove 3f2a90c1d2e4 math code-alone
    """
    with reporting_errors():
        from mode.artefacts.edit import remove_expert
        from mode.artefacts.find import find_model
        from mode.artefacts.write import check_vacant

        check_vacant(folder)
        source = find_model(run, find_runs_folder(overrides, conf))
        write(remove_expert(source, domain), source, folder, embed=embed)


def export(
    run: Model,
    folder: Folder,
    overrides: Overrides = None,
    experts: Annotated[str | None, typer.Option(help="Experts to keep, separated by commas; all by default.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of the weights.")] = "fp32",
    merge: Annotated[bool, typer.Option("--merge", help="Average one expert into the backbone.")] = False,
    conf: ConfOption = None,
) -> None:
    """Write a run as a self-contained folder.

    The folder has backbone, experts, gates and tokenizer. With --merge, the only expert is averaged into the backbone's
    layers, weighted by its mean gate on validation text. The merged model has the backbone's size and speed. It is an
    approximation, so its validation accuracy is printed.

    Example: mode export 3f2a90c1d2e4 code-model --experts code --precision bf16
    """
    with reporting_errors():
        from mode.artefacts.edit import keep_experts, merge_and_measure
        from mode.artefacts.find import find_model
        from mode.artefacts.write import check_vacant

        check_vacant(folder)
        source = find_model(run, find_runs_folder(overrides, conf))
        model = source.model
        if experts is not None:
            model = keep_experts(source, [name.strip() for name in experts.split(",") if name.strip()])
        if merge:
            model, before, after = merge_and_measure(model, source)
            gated, plain = 100 * before.accuracy, 100 * after.accuracy
            print(f"validation accuracy: {gated:.2f} % with gates, {plain:.2f} % merged")
        write(model, source, folder, embed=True, precision=precision)


def write(model: object, source: FoundModel, folder: Path, *, embed: bool, precision: str = "fp32") -> None:
    """Write a model and print the path and size of its folder."""
    from mode.artefacts.write import write_model

    title = source.run.track.name or type(source.run.method).__name__ if source.run else folder.name
    write_model(model, source.place, folder, embed=embed, precision=precision, title=title, tokenizer=source.tokenizer)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder}: {size / 1e6:.1f} MB")
