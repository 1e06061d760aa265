"""Settings of the training loop, in groups."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT, Share, as_fraction


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optim:
    """AdamW and its schedule: a linear warm-up, then a cosine decay.

    Attributes:
        warmup_ratio: Share of the steps in the linear warm-up.
        min_lr_ratio: Learning rate at the end of the cosine decay, as a share of the peak.
        weight_decay: Decoupled weight decay of matrices. Vectors have no weight decay.
        betas: Decay rates of AdamW's two moment estimates.
        max_grad_norm: Maximum global gradient norm. Larger gradients are scaled down to it.
    """

    always_recorded: ClassVar[frozenset[str]] = frozenset(
        {"warmup_ratio", "min_lr_ratio", "weight_decay", "betas", "max_grad_norm"}
    )

    warmup_ratio: Share = 0.05
    min_lr_ratio: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.95)
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Batch:
    """The rows of an optimizer step.

    Attributes:
        size: Rows per optimizer step, over all micro-batches and processes.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        examples: Number of different rows in the training mix; training repeats them. null uses all rows. Earlier
            stages of a method always use all rows.
        replay: Other domains in the training mix, each with its share of the rows, such as `{english: 0.2}`. Earlier
            stages of a method have no replay.
        intra_document_masking: Whether tokens attend only to their own document in training, with positions that
            restart at every document. Evaluation always attends to the whole row.
    """

    always_recorded: ClassVar[frozenset[str]] = frozenset({"size", "gradient_accumulation_steps"})

    size: Annotated[int, Field(gt=0)] = 8
    gradient_accumulation_steps: Annotated[int, Field(gt=0)] = 1
    examples: Annotated[int, Field(gt=0)] | None = None
    replay: dict[str, Annotated[float, Field(gt=0.0, lt=1.0)]] | None = None
    intra_document_masking: bool = False

    def __post_init__(self) -> None:
        if self.size % self.gradient_accumulation_steps:
            raise ValueError(
                f"train.batch.size={self.size} is not a multiple of "
                f"train.batch.gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        # In order of name, and None for nothing: the same mix is the same run however it is written.
        object.__setattr__(self, "replay", dict(sorted((self.replay or {}).items())) or None)
        if self.replay and sum(self.replay.values()) >= 1.0:
            raise ValueError("train.batch.replay: nothing is left for the targets")
        if self.replay and any(abs(float(as_fraction(share)) - share) > 1e-9 for share in self.replay.values()):
            raise ValueError(
                "train.batch.replay: shares are fractions with a denominator up to 100, such as 0.125 or 0.1"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Memory:
    """The memory of training.

    Attributes:
        activation_checkpointing: Layers whose activations are recomputed in the backward pass, which takes less memory
            and more time: `none`, the `frozen` layers, `all` layers, or with `auto` as few layers as fit in
            `budget_gb`.
        budget_gb: With `activation_checkpointing=auto`, GB for weights, gradients, optimizer state and a step.
        frozen_weights: Precision of the frozen linear layers of decoder layers in training and evaluation: `full`, or
            eight bits per weight with one scale per row, `int8` or `fp8`. Exported models have full precision.
    """

    activation_checkpointing: Literal["none", "frozen", "all", "auto"] = "none"
    budget_gb: Annotated[float, Field(gt=0.0)] | None = None
    frozen_weights: Literal["full", "int8", "fp8"] = "full"

    def __post_init__(self) -> None:
        if (self.activation_checkpointing == "auto") != (self.budget_gb is not None):
            raise ValueError("train.memory.activation_checkpointing=auto and train.memory.budget_gb go together")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Kernels:
    """The computation of a step.

    Attributes:
        compile: Whether decoder layers are compiled, which takes up to 40 s before the first step. `auto` compiles in
            stages of about five minutes and more.
        attention: Attention with `train.batch.intra_document_masking`: `sdpa`, torch's own with a full mask, or `flex`,
            FlexAttention, which skips masked blocks and needs CUDA.
        branch_execution: Execution of the branches of a MoDE block in training: in a `loop`, `batched` as one
            computation, or on CUDA `streams`.
        cuda_graph: Whether the forward and backward pass of a step are one CUDA graph, which saves kernel launches in
            short steps.
    """

    compile: bool | Literal["auto"] = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    branch_execution: Literal["loop", "batched", "streams"] = "loop"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.branch_execution == "batched" and self.compile:
            raise ValueError("train.kernels.branch_execution=batched does not go with train.kernels.compile")
        if self.branch_execution == "streams" and self.cuda_graph:
            raise ValueError("train.kernels.branch_execution=streams does not go with train.kernels.cuda_graph")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Parallelism:
    """The layout of a run over several processes. Results are equal up to rounding.

    Attributes:
        strategy: Part of the model and of the rows in every process. `ddp`: the whole model and a part of the rows;
            `fsdp`: a shard of the model and a part of the rows; `tp`: a slice of every matrix and all rows; `mpmd`:
            some branches of a MoDE model.
        microbatches_in_flight: With `mpmd`, the number of micro-batches in the blocks at the same time, so that
            processes overlap computation and communication.
        placement: With `mpmd`, the branches of every slot by number, such as `[[0], [1, 2]]`; 0 is the backbone. null
            balances the work over the slots. The number of slots is the largest divisor of the number of processes that
            is at most the number of branches.
    """

    strategy: Literal["ddp", "fsdp", "tp", "mpmd"] = "ddp"
    microbatches_in_flight: Annotated[int, Field(gt=0)] = 1
    placement: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.strategy != "mpmd" and (self.microbatches_in_flight > 1 or self.placement is not None):
            raise ValueError(
                "train.parallelism.microbatches_in_flight and placement go with "
                f"train.parallelism.strategy=mpmd, not {self.strategy}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train:
    """The training loop.

    Attributes:
        steps: Optimizer steps of a stage.
        sequence_length: Tokens per row.
        lr: Peak learning rate of this run. null uses that of the method. Earlier stages of a method keep their own.
        precision: `fp32`; `bf16`, by autocast with weights in fp32; or `auto`: bf16 on GPUs, bf16 on CPUs with AMX for
            models with a hidden size from 256, and fp32 otherwise.
        device: Device of training.
        threads: Number of CPU threads of torch. It identifies a run, because the order of sums depends on it.
        log_every: Steps between two points of the training curve.
        checkpoint_every: Steps between two checkpoints.
        validate_every: Steps between two validations on the training domains; 0 validates only at the end.
        optim: AdamW and its schedule.
        batch: The rows of a step.
        memory: The memory of training.
        kernels: The computation of a step.
        parallelism: The layout over several processes.
    """

    always_recorded: ClassVar[frozenset[str]] = frozenset(
        {"steps", "sequence_length", "lr", "precision", "device", "threads", "optim", "batch"}
    )

    steps: Annotated[int, Field(ge=0)] = 80
    sequence_length: Annotated[int, Field(gt=1)] = 256
    lr: Annotated[float, Field(gt=0.0)] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(gt=0)] = 1
    log_every: Annotated[int, Field(gt=0)] = 10
    checkpoint_every: Annotated[int, Field(gt=0)] = 20
    validate_every: Annotated[int, Field(ge=0)] = 0
    optim: Optim = Optim()
    batch: Batch = Batch()
    memory: Memory = Memory()
    kernels: Kernels = Kernels()
    parallelism: Parallelism = Parallelism()

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "validate_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(
                    f"train.{name}={getattr(self, name)} is not a multiple of train.log_every={self.log_every}"
                )
        if conflict := self.find_conflict():
            raise ValueError("train.{} does not go with train.{}".format(*conflict))
        if self.kernels.attention == "flex" and not self.batch.intra_document_masking:
            raise ValueError("train.kernels.attention=flex goes with train.batch.intra_document_masking=true")

    def find_conflict(self) -> tuple[str, str] | None:
        """Return the first two settings of different groups that exclude each other; None without a conflict."""
        memory, kernels, strategy = self.memory, self.kernels, self.parallelism.strategy
        recomputes = f"memory.activation_checkpointing={memory.activation_checkpointing}"
        frozen = f"memory.frozen_weights={memory.frozen_weights}"
        branches = f"kernels.branch_execution={kernels.branch_execution}"
        parallel, masking = f"parallelism.strategy={strategy}", "batch.intra_document_masking=true"
        plain = {"memory.activation_checkpointing=none", "memory.frozen_weights=full", "kernels.branch_execution=loop"}
        given = {recomputes, frozen, branches} - plain | {f"kernels.attention={kernels.attention}"}
        given |= {parallel} if strategy != "ddp" else set()
        given |= {masking} if self.batch.intra_document_masking else set()
        given |= {"kernels.cuda_graph=true"} if kernels.cuda_graph else set()
        pairs = (
            ("memory.activation_checkpointing=auto", parallel),  # auto measures a whole model
            (branches, parallel),
            (frozen, parallel),
            (frozen, "kernels.branch_execution=batched"),
            ("kernels.branch_execution=batched", recomputes),
            ("kernels.cuda_graph=true", recomputes),
            (masking, "kernels.cuda_graph=true"),
            (masking, "kernels.branch_execution=batched"),
            ("kernels.attention=flex", "parallelism.strategy=mpmd"),
        )
        return next((pair for pair in pairs if given.issuperset(pair)), None)
