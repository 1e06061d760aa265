"""mode expert show, add, remove; mode export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.options import ConfOption, Overrides, reporting_errors, runs_folder

if TYPE_CHECKING:
    from mode.artefacts.find import FoundModel

app = typer.Typer(help="Look at experts, put them into a composed model, take them out.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="RUN", help="A run's id or the start of it, or a model's folder.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder to write.")]
EmbedOption = Annotated[bool, typer.Option("--embed", help="Put the backbone's weights into the folder too.")]


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="EXPERT", help="An expert's folder, or a run's id or folder.")],
    overrides: Overrides = None,
    conf: ConfOption = None,
) -> None:
    """Show what an expert is, and whether its weights are whole; or the experts of a composed model.

    Example: mode expert show runs/3f2a90c1d2e4/expert
    """
    with reporting_errors():
        from mode.artefacts.find import find_expert_folder, find_model, list_branches
        from mode.core.errors import ConfigError
        from mode.modular.artefact import load_experts

        runs = runs_folder(overrides, conf)
        if any(path.name.startswith(name) and not (path / "expert").exists() for path in runs.glob("*")):
            recalled = find_model(name, runs)
            config = recalled.model.config
            if not list_branches(recalled):
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
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="An expert's folder, or a run's id or folder.")],
    folder: Folder,
    overrides: Overrides = None,
    embed: EmbedOption = False,
    conf: ConfOption = None,
) -> None:
    """Put one more expert into a composed model, without training: the others keep their odds.

    Example: mode expert add 3f2a90c1d2e4 ~/experts/law with-law
    """
    with reporting_errors():
        from mode.artefacts.edit import join_experts
        from mode.artefacts.find import find_expert_folder, find_model
        from mode.artefacts.write import check_vacant

        runs = runs_folder(overrides, conf)
        check_vacant(folder)
        place = find_expert_folder(expert, runs, ())
        recalled = find_model(run, runs)
        write(join_experts(recalled, place), recalled, folder, embed=embed)


@app.command("remove")
def remove(
    run: Model,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="Expert to take out.")],
    folder: Folder,
    overrides: Overrides = None,
    embed: EmbedOption = False,
    conf: ConfOption = None,
) -> None:
    """Take an expert out of a composed model, without training: the others keep their odds.

    Example: mode expert remove 3f2a90c1d2e4 math code-alone
    """
    with reporting_errors():
        from mode.artefacts.edit import remove_expert
        from mode.artefacts.find import find_model
        from mode.artefacts.write import check_vacant

        check_vacant(folder)
        recalled = find_model(run, runs_folder(overrides, conf))
        write(remove_expert(recalled, domain), recalled, folder, embed=embed)


def export(
    run: Model,
    folder: Folder,
    overrides: Overrides = None,
    experts: Annotated[str | None, typer.Option(help="Experts to keep, by comma; all by default.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of the weights.")] = "fp32",
    merge: Annotated[bool, typer.Option("--merge", help="Average one expert into the backbone: no gates.")] = False,
    conf: ConfOption = None,
) -> None:
    """Write a run as a self-contained folder: backbone, experts, gates, tokenizer.

    With --merge the one expert that is kept is averaged into the backbone's layers by its mean gate on validation text:
    a model of the backbone's size and speed, and an approximation, whose validation accuracy is told.

    Example: mode export 3f2a90c1d2e4 code-model --experts code --precision bf16
    """
    with reporting_errors():
        from mode.artefacts.edit import keep_experts, merge_and_measure
        from mode.artefacts.find import find_model
        from mode.artefacts.write import check_vacant

        check_vacant(folder)
        recalled = find_model(run, runs_folder(overrides, conf))
        model = recalled.model
        if experts is not None:
            model = keep_experts(recalled, [name.strip() for name in experts.split(",") if name.strip()])
        if merge:
            model, before, after = merge_and_measure(model, recalled)
            gated, plain = 100 * before.accuracy, 100 * after.accuracy
            print(f"validation accuracy: {gated:.2f} % with gates, {plain:.2f} % merged")
        write(model, recalled, folder, embed=True, precision=precision)


def write(model: object, recalled: FoundModel, folder: Path, *, embed: bool, precision: str = "fp32") -> None:
    """Write a model and say where."""
    from mode.artefacts.write import write_model

    title = recalled.run.track.name or type(recalled.run.method).__name__ if recalled.run else folder.name
    write_model(model, recalled.place, folder, embed=embed, precision=precision, title=title)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder}: {size / 1e6:.1f} MB")
