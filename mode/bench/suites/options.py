"""Suites `options` and `branches`: time and memory of a step under each training option."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mode.bench.suites.step import FOUR, FULL, LORA, ONE, PLAIN, Step, choose_methods
from mode.bench.timing import Case
from mode.config.check import replace_settings
from mode.config.method import Anchor
from mode.core.files import locate_checkpoint
from mode.core.tensors import list_trainable
from mode.train.checkpoint import Saver
from mode.train.cuda_graph import WARM_UP

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.methods.mode import MoDE

OPTIONAL = (FULL, LORA, ONE)
"""Methods that are measured under the training options."""


def prepare_options(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that vary precision, activation checkpointing, compilation and frozen weights of a step.

    Args:
        run: Run with the backbone, the batch size and the sequence length.
        method: Method with the shape of blocks, experts and gates.
        device: Device of the models.
        folder: Folder for a checkpoint.
    """
    variants: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "compiled layers": {"kernels.compile": True},
        "compiled layers, bf16": {"kernels.compile": True, "precision": "bf16"},
        "activations of frozen layers formed again": {"memory.activation_checkpointing": "frozen"},
        "activations of all layers formed again": {"memory.activation_checkpointing": "all"},
        "frozen weights in int8, bf16": {"memory.frozen_weights": "int8", "precision": "bf16"},
        "frozen weights in fp8, bf16": {"memory.frozen_weights": "fp8", "precision": "bf16"},
    }
    if device.type == "cuda":  # compiling takes long on a GPU, and training in fp32 is rare there
        variants.pop("compiled layers")
    methods = choose_methods(run, method)
    cases = []
    for name in OPTIONAL:
        for variant, changes in variants.items():
            changed = replace_settings(run, train=replace_settings(run.train, **PLAIN | changes))
            if name != FULL or "frozen" not in variant:  # full fine-tuning freezes nothing
                cases.append(Step(changed, methods[name], Anchor(), device).case(f"options, {name}", variant))
    return cases, measure_checkpoint(Step(run, methods[ONE], Anchor(), device), folder)


def prepare_branches(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that vary the execution of branches and, on a GPU, the use of a CUDA graph.

    Args:
        run: Run with the backbone, the batch size and the sequence length.
        method: Method with the shape of blocks, experts and gates.
        device: Device of the models.
        folder: Not used.
    """
    methods, plain = choose_methods(run, method), PLAIN | {"precision": run.train.precision}
    ways: dict[str, dict[str, Any]] = {"in a loop": {}, "batched": {"kernels.branch_execution": "batched"}}
    if device.type == "cuda":
        ways |= {f"{name}, one graph": {**changes, "kernels.cuda_graph": True} for name, changes in ways.items()}
        ways["on streams"] = {"kernels.branch_execution": "streams"}
    jobs = {(f"branches, {FOUR}", FOUR): ways}
    if device.type == "cuda":
        graphs = {
            "launched": {},
            "one graph": {"kernels.cuda_graph": True},
            "one graph, compiled layers": {"kernels.cuda_graph": True, "kernels.compile": True},
        }
        jobs |= {(f"graph, {name}", name): graphs for name in OPTIONAL}
    cases = []
    for (job, name), variants in jobs.items():
        for variant, changes in variants.items():
            changed = replace_settings(run, train=replace_settings(run.train, **plain | changes))
            step = Step(changed, methods[name], Anchor(), device)
            for _ in range(WARM_UP + 1 if step.settings.kernels.cuda_graph else 0):  # replays alone are timed
                step()
            cases.append(step.case(job, variant))
    return cases, {}


def measure_checkpoint(step: Step, folder: Path) -> dict[str, int]:
    """Return the bytes of trainable weights with the optimizer state of AdamW, and of a checkpoint."""
    step()
    with Saver() as saver:
        saver.save(folder, list_trainable(step.model), step.optimizer, 1, 0.0)
    size = sum(file.stat().st_size for file in locate_checkpoint(folder, 1).glob("*.safetensors"))
    return {"weights that train, and their moments": 3 * step.bytes, "checkpoint": size}
