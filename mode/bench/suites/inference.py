"""Suites `inference` and `generate`: size, loading time and generation speed of models with experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from mode.artefacts.find import load_folder
from mode.artefacts.write import write_model
from mode.backbone.load import fingerprint_weights, load_model, locate
from mode.bench.timing import Case
from mode.modular.artefact import describe_fit, load_experts, save_expert
from mode.modular.edit import swap_expert
from mode.modular.model import MoDEForCausalLM, make_modular

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.methods.mode import MoDE

PROMPT, NEW, LONG = 32, 32, 256
"""Tokens of the prompt, of its continuation, and of the text that is read at once."""


def prepare_inference(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Write models to a folder; return cases that load, use and exchange them, and the bytes of their weights.

    Experts have fresh weights. Neither size nor speed depends on the weights.

    Args:
        run: Run with the backbone.
        method: Method with the shape of blocks, experts and gates.
        device: Device of the models.
        folder: Folder to write to.
    """
    names = {"backbone": 0, "backbone + 1 expert": 1, "backbone + 2 experts": 2}
    places = {name: folder / str(number) for name, number in names.items()}
    for name, number in names.items():
        experts = ["one", "two"][:number]
        model = build_modular(run, method, experts) if experts else load_model(run.backbone)
        write_model(model, locate(run.backbone), places[name], embed=True)
    for name in ("two", "three"):
        save_expert(build_modular(run, method, [name]), folder / name, describe_expert(run, method, name))
    live = {name: load_folder(place).to(device) for name, place in places.items()}
    cases = [Case("load", name, partial(load_and_use, place, device)) for name, place in places.items()]
    for job, use, tokens in (("read", read_prompt, LONG), ("generate", write_tokens, NEW)):
        cases += [Case(job, name, partial(use, model), tokens) for name, model in live.items()]
    whole = places["backbone"]
    cases += [
        Case("exchange", "fine-tuned model, loaded anew", partial(load_and_use, whole, device)),
        Case("exchange", "fine-tuned model, read over the live one", partial(overwrite, live["backbone"], whole)),
        Case("exchange", "one expert for another in the live model", make_swap(live["backbone + 2 experts"], folder)),
    ]
    sizes = {name: measure_weight_bytes(place) for name, place in places.items()}
    return cases, {**sizes, "one expert": measure_weight_bytes(folder / "two")}


def build_modular(run: Run, method: MoDE, experts: list[str]) -> MoDEForCausalLM:
    """Build a model with fresh experts."""
    return make_modular(
        load_model(run.backbone),
        experts=experts,
        num_blocks=method.num_blocks,
        expert_layers=method.expert_layers,
        init="random",
        gate=method.gate,
        head_rank=method.head_rank,
    )


def describe_expert(run: Run, method: MoDE, name: str) -> dict[str, Any]:
    """Return the description of a fresh expert, with the fields of a trained expert."""
    return {
        "domain": name,
        "backbone": run.backbone.name,
        "backbone_fingerprint": fingerprint_weights(run.backbone),
        **describe_fit(method, method.gate),
        **dict.fromkeys(("steps", "tokens", "seed"), 0),
    }


def load_and_use(place: Path, device: torch.device) -> None:
    """Load a model from its folder to a device and use it once, since memory-mapped weights are read on first use."""
    read_prompt(load_folder(place).to(device), 1)


def make_ids(model: Any, count: int) -> torch.Tensor:
    """Return fixed token ids, (1, count)."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(count, device=model.device)[None] * 7919 % vocabulary


@torch.no_grad()
def read_prompt(model: Any, count: int = LONG) -> None:
    """Run one forward pass over a text, for the logits of the next token."""
    model(input_ids=make_ids(model, count), logits_to_keep=1)


def write_tokens(model: Any) -> None:
    """Generate `NEW` tokens greedily after a prompt of `PROMPT` tokens."""
    prompt = make_ids(model, PROMPT)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )


def overwrite(model: Any, place: Path) -> None:
    """Load a folder's weights into a model of the same shape, and use the model once."""
    for path in place.glob("*.safetensors"):
        model.load_state_dict(load_file(path), strict=False)  # a tied head is not in the file
    read_prompt(model, 1)


def make_swap(model: MoDEForCausalLM, folder: Path) -> Callable[[], None]:
    """Return an action that loads and checks an expert, replaces another expert with it, and uses the model once."""

    def action() -> None:
        leaves, comes = ("two", "three") if "two" in model.config.experts else ("three", "two")
        swap_expert(model, leaves, comes, load_experts(folder / comes)[comes].tensors)
        read_prompt(model, 1)

    return action


def measure_weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


NUMBERS = (1, 2, 4, 8)
"""Numbers of experts to measure."""


def prepare_generation(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that read and generate with several numbers of experts, and the bytes of every model's weights.

    Args:
        run: Run with the backbone.
        method: Method with the shape of blocks, experts and gates.
        device: Device of the models.
        folder: Not used.
    """
    live = {"backbone": load_model(run.backbone)}
    for number in NUMBERS:
        names = [f"expert-{index + 1}" for index in range(number)]
        live[f"{number} expert{'s' * (number > 1)}"] = build_modular(run, method, names)
    live = {name: model.to(device).eval() for name, model in live.items()}
    cases = []
    for job, use, tokens in (("read", read_prompt, LONG), ("generate", write_tokens, NEW)):
        for name, model in live.items():
            cases.append(Case(job, name, partial(use, model), tokens=tokens, counted=True))
    return cases, {name: sum(part.nbytes for part in model.parameters()) for name, model in live.items()}
