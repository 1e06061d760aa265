"""Settings of the one loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT, Share, as_fraction


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train:
    """The one loop's settings.

    Attributes:
        steps: Optimizer steps of a stage.
        batch_size: Rows per optimizer step, over all accumulated micro-batches.
        accumulate: Micro-batches per optimizer step.
        sequence_length: Tokens per row.
        lr: Overrides the method's learning rate for this run (not for the stages it builds on).
        warmup: Share of the steps with linearly rising learning rate.
        final_lr: Learning rate at the end of the cosine, as a share of the peak.
        weight_decay: Decoupled weight decay of matrices; vectors have none.
        betas: AdamW's decay rates.
        clip: Largest global gradient norm.
        precision: `fp32`, `bf16` (autocast, weights stay fp32), or `auto`: bf16 where it pays (`mode.train.objective`),
            which is on GPUs and, for models as wide as 256, on processors with AMX; else fp32.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads of torch; part of the configuration because the order of sums depends on it.
        log_every: Steps between two points of the training curve.
        checkpoint_every: Steps between two checkpoints.
        validate_every: Steps between two validations of the training domains; 0 validates at the end only.
        examples: Different rows that the mix is made of, seen again and again; all by default. Earlier stages of a
            row have all.
        activation_checkpointing: Layers that keep no activations but form them again in the backward pass, which takes
            less memory and more time: `frozen` ones, where nothing trains, or `all`; `auto`: as few as `memory` allows.
        memory: Of `auto`: GB that weights, gradients, optimizer states and a step may take.
        compile: Whether decoder layers are compiled, which takes up to 40 s before the first step, and 5 s where it
            was done before; `auto`: in stages of about five minutes and more (`mode.train.step_options`).
        frozen_weights: How the frozen linear maps of decoder layers are held, in training and in scoring: in `full`, or
            in eight bits a weight with a scale for every row, `int8` or `fp8`. A finished model is exported, makes text
            and answers downstream tasks in full.
        documents: What documents of a row see of each other in training: `joined`, all before them, as in the paper;
            `apart`, nothing, with positions that begin anew. Rows are scored joined either way.
        attention: Of documents apart: `sdpa`, torch's own with a mask of every pair of a row's tokens, or `flex`,
            FlexAttention, which knows where documents end and skips what none of a block sees; on CUDA alone.
        branches: How the branches of a MoDE block run in training steps: in a `loop`; `batched`, all experts as one
            computation; `streams`, each on a CUDA stream of its own.
        graph: Whether forward and backward pass of a step are one CUDA graph, which is recorded in the third step and
            takes the processor's launches away: what short steps of small models wait for.
        layout: How several processes share a run: `ddp`, each all of the model and its part of the rows; `fsdp`, each a
            shard of it; `tp`, each a slice of every matrix and all rows; `mpmd`, each some branches of a MoDE model.
            The result is the same but for rounding.
        in_flight: Of `mpmd`: micro-batches that pass through the blocks one after the other, so that a slot has work
            while another's output is on its way.
        placement: Of `mpmd`: the branches of every slot, by number; 0 is the backbone. By default as many slots as the
            processes allow, of as even work as can be.
        replay: Share of the mix's rows that other domains than the targets give, by domain. Earlier stages have none.
    """

    steps: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(gt=0)]
    accumulate: Annotated[int, Field(gt=0)]
    sequence_length: Annotated[int, Field(gt=1)]
    lr: Annotated[float, Field(gt=0.0)] | None
    warmup: Share
    final_lr: Share
    weight_decay: Annotated[float, Field(ge=0.0)]
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]]
    clip: Annotated[float, Field(gt=0.0)]
    precision: Literal["auto", "fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(gt=0)]
    log_every: Annotated[int, Field(gt=0)]
    checkpoint_every: Annotated[int, Field(gt=0)]
    validate_every: Annotated[int, Field(ge=0)]
    examples: Annotated[int, Field(gt=0)] | None = None
    activation_checkpointing: Literal["none", "frozen", "all", "auto"] = "none"
    memory: Annotated[float, Field(gt=0.0)] | None = None
    compile: bool | Literal["auto"] = False
    frozen_weights: Literal["full", "int8", "fp8"] = "full"
    documents: Literal["joined", "apart"] = "joined"
    attention: Literal["sdpa", "flex"] = "sdpa"
    branches: Literal["loop", "batched", "streams"] = "loop"
    graph: bool = False
    layout: Literal["ddp", "fsdp", "tp", "mpmd"] = "ddp"
    in_flight: Annotated[int, Field(gt=0)] = 1
    placement: tuple[tuple[int, ...], ...] | None = None
    replay: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if (self.activation_checkpointing == "auto") != (self.memory is not None):
            raise ValueError("activation_checkpointing=auto and memory go together")
        if self.activation_checkpointing == "auto" and self.layout != "ddp":  # what it measures is a whole model
            raise ValueError(f"activation_checkpointing=auto goes with layout=ddp, not {self.layout}")
        if self.layout != "ddp" and self.branches != "loop":
            raise ValueError(f"layout={self.layout} goes with branches=loop")
        if self.frozen_weights != "full" and (self.layout != "ddp" or self.branches == "batched"):
            raise ValueError(
                f"frozen_weights={self.frozen_weights} goes with layout=ddp, and not with branches=batched"
            )
        if self.layout != "mpmd" and (self.in_flight > 1 or self.placement is not None):
            raise ValueError(f"in_flight and placement go with layout=mpmd, not {self.layout}")
        if self.branches == "batched" and (self.compile or self.activation_checkpointing != "none"):
            raise ValueError("branches=batched goes with neither compile nor activation_checkpointing")
        if self.graph and (self.activation_checkpointing != "none" or self.branches == "streams"):
            raise ValueError("graph goes with neither activation_checkpointing nor branches=streams")
        if self.documents == "apart" and (self.graph or self.branches == "batched"):
            raise ValueError("documents=apart goes with neither graph nor branches=batched")
        if self.attention == "flex" and (self.documents == "joined" or self.layout == "mpmd"):
            raise ValueError("attention=flex goes with documents=apart, and not with layout=mpmd")
        # In order of name, and None for nothing: the same mix is the same run however it is written.
        object.__setattr__(self, "replay", dict(sorted((self.replay or {}).items())) or None)
        if self.replay and sum(self.replay.values()) >= 1.0:
            raise ValueError("replay: nothing is left for the targets")
        if self.replay and any(abs(float(as_fraction(share)) - share) > 1e-9 for share in self.replay.values()):
            raise ValueError("replay: shares are fractions with a denominator up to 100, such as 0.125 or 0.1")
        for name in ("checkpoint_every", "validate_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of log_every {self.log_every}")
