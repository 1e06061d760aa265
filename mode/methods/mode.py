"""The MoDE method: stage 1 trains one expert per domain, stage 2 composes them (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.method import Anchor, GateSettings
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import expand_home
from mode.cost.flops import Cost
from mode.cost.modular import estimate_kept_shares, modular_cost
from mode.methods.anchored import Adaptation
from mode.methods.base import Material, Reference
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mode.modular.artefact import Expert


@settings(frozen=True, kw_only=True, config=STRICT)
class MoDE(Adaptation):
    """Modular Domain Experts.

    `start=fresh` trains new experts and gates directly: with one target and one expert this is stage 1; with several
    targets it is the paper's Uninitialized row. `start=experts` first asks for one stage-1 run per target, then
    composes them and fine-tunes on the mix; with `train_experts=false` gates alone train (the Frozen row).

    Attributes:
        lr: Peak learning rate of fresh experts and their gates.
        compose_lr: Peak learning rate of stage 2.
        gates_lr: Peak learning rate of stage 2 when gates alone train.
        start: Where the experts come from.
        num_experts: N for `start=fresh`; with `start=experts` there is one per target.
        num_blocks: B, blocks that the backbone's layers fall into.
        expert_layers: l, layers per expert and block.
        init: Initialisation of fresh experts: `random`, or `copy` of the block's first layers.
        backbone_bias: Initial logit of the backbone in fresh gates, against 0 for every expert.
        gate_noise: Standard deviation of the first weights of gates whose experts begin as copies of the same layers:
            without it they would have equal gradients and stay equal. All other gates are initialised to zero.
        handover: Gates of stage 2: `odds` keeps every expert's odds against the backbone; `fresh` starts anew; `solved`
            tells the text of every branch apart, by closed form (`mode.modular.solved_gates`).
        gate_lr_scale: Learning rate of gates as a factor on that of experts.
        train_experts: Whether stage 2 trains the experts too, or gates alone.
        gate: How gates choose; as in the paper by default.
        head_rank: r, rank of every expert's update of the head; 0, as in the paper, for none.
        anchor_experts: Whether the anchor applies to stage 1 too; else to stage 2 alone.
        experts: Folders of trained experts, or of saved models with experts; the other targets' experts are stage-1
            runs.
    """

    recorded_as: ClassVar[str] = "mode.modular_method.MoDE"
    family: ClassVar[str] = "modular layers"
    weighs_experts: ClassVar[bool] = True

    always_recorded: ClassVar[frozenset[str]] = frozenset(
        {
            "start",
            "num_experts",
            "expert_layers",
            "init",
            "backbone_bias",
            "gate_noise",
            "handover",
            "gate_lr_scale",
            "train_experts",
        }
    )

    compose_lr: Annotated[float, Field(gt=0.0)]
    gates_lr: Annotated[float, Field(gt=0.0)]
    start: Literal["fresh", "experts"] = "experts"
    num_experts: Annotated[int, Field(gt=0)] = 2
    num_blocks: Annotated[int, Field(gt=0)]
    expert_layers: Annotated[int, Field(gt=0)] = 1
    init: Literal["random", "copy"] = "copy"
    backbone_bias: float = 2.0
    gate_noise: Annotated[float, Field(gt=0.0)] = 0.02
    handover: Literal["odds", "fresh", "solved"] = "odds"
    gate_lr_scale: Annotated[float, Field(gt=0.0)] = 1.0
    train_experts: bool = True
    gate: GateSettings = GateSettings()
    head_rank: Annotated[int, Field(ge=0)] = 0
    anchor_experts: bool = False
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.experts and self.start == "fresh":
            raise ValueError("experts are composed, so they go with start=experts")
        if self.start == "fresh" and not self.train_experts:
            raise ValueError("train_experts=false leaves fresh experts untrained; it goes with start=experts")
        if self.head_rank and self.gate.scope == "prefix":
            raise ValueError("head_rank goes with gate.scope=token: the head keeps no cache of the prefix")
        if self.gate.hidden and self.start == "experts":
            raise ValueError("gate.hidden goes with start=fresh: a hidden layer belongs to no one expert")

    @property
    def source(self) -> str:
        """Return the paper; with an anchor, a change of the head or other gates, this project."""
        published = (self.anchor, self.gate, self.head_rank) == (Anchor(), GateSettings(), 0)
        return "Schafhalter et al., 2024" if published else "this project"

    @property
    def alike(self) -> bool:
        """Whether several experts are initialised as copies of the same layers."""
        return self.start == "fresh" and self.init == "copy" and self.num_experts > 1

    def peak_lr(self) -> float:
        """Return the learning rate of this stage."""
        if self.start == "fresh":
            return self.lr
        return self.compose_lr if self.train_experts else self.gates_lr

    def unused(self) -> tuple[str, ...]:
        """Return the settings without effect: those of stage 2 in stage 1, and the number of experts in stage 2."""
        if self.start == "fresh":
            same = () if self.alike else ("gate_noise",)
            return ("compose_lr", "gates_lr", "handover", "experts", "anchor_experts", *same)
        alone = ("anchor_experts",) if self.anchor.source == "none" else ()
        lr = "gates_lr" if self.train_experts else "compose_lr"
        return ("num_experts", "gate_noise", lr, "experts", *alone)  # experts count by their digest

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one stage-1 run per target whose expert is not given by `experts`."""
        anchor = self.anchor if self.anchor_experts else Anchor()
        stage = replace_settings(self, start="fresh", num_experts=1, train_experts=True, experts=(), anchor=anchor)
        return stages_by_domain(run, stage, self.missing(run))

    def cost(self, run: Run) -> Cost:
        """Return what this stage takes by closed form (`mode.cost.modular`)."""
        return modular_cost(
            read_shape(run.backbone),
            run.train.sequence_length,
            num_experts=self.count(run),
            num_blocks=self.num_blocks,
            expert_layers=self.expert_layers,
            head_rank=self.head_rank,
            gate_hidden=self.gate.hidden,
            top_k=self.gate.top_k,
            shares=self.kept_shares(run),
            experts_train=self.train_experts,
        )

    def kept_shares(self, run: Run) -> tuple[float, float]:
        """Return the shares of tokens that the last layers of the backbone's and of an expert's branch run on."""
        return estimate_kept_shares(
            run.train,
            num_branches=self.count(run) + 1,
            top_k=self.gate.top_k,
            reads_output=self.gate.reads == "output",
            experts_train=self.train_experts,
        )

    def count(self, run: Run) -> int:
        """Return N, the experts of this stage's model."""
        return self.num_experts if self.start == "fresh" else len(run.targets)

    def at_hand(self) -> dict[str, Path]:
        """Return the folders of the given experts, by domain.

        Raises:
            ConfigError: A folder has no expert, or two have experts for the same domain.
        """
        if not self.experts:
            return {}
        from mode.modular.artefact import read_descriptions

        found: dict[str, Path] = {}
        for folder in map(Path, self.experts):
            for domain in read_descriptions(expand_home(folder)):
                if domain in found:
                    raise ConfigError(f"method.experts: {found[domain]} and {folder} are both for {domain}")
                found[domain] = expand_home(folder)
        return found

    def missing(self, run: Run) -> tuple[str, ...]:
        """Return the targets whose experts have to be trained first."""
        found = self.at_hand()
        return () if self.start == "fresh" else tuple(name for name in run.targets if name not in found)

    def artefacts(self, run: Run) -> dict[str, str]:
        """Return the weight digests of the given experts, checked against the run's backbone and blocks.

        Raises:
            ConfigError: An expert is damaged, made for another model, or for no target.
        """
        if not self.experts:
            return {}
        from mode.modular.artefact import check_fits, describe_fit, load_experts

        wanted = {
            "backbone": run.backbone.name,
            "backbone_fingerprint": self.backbone_fingerprint(run),
            **describe_fit(self, self.gate),
        }
        folders = self.at_hand()
        for domain, folder in folders.items():
            if domain not in run.targets:
                raise ConfigError(f"{folder}: an expert for {domain}, which is not one of targets={list(run.targets)}")
        found = {}
        for folder in dict.fromkeys(folders.values()):  # a model's folder is read once for all its experts
            for domain, expert in load_experts(folder).items():
                check_fits(expert.about, wanted, folder)
                found[domain] = str(expert.about["weights"])
        return found

    def lr_scales(self) -> Mapping[str, float]:
        """Scale the learning rate of gates where experts train too."""
        return {".gate.": self.gate_lr_scale} if self.train_experts else {}

    def inspect(self, model: nn.Module) -> dict[str, float]:
        """Report the mean gate of every block."""
        from mode.modular.block import read_gate_means

        return read_gate_means(model)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of a gate's branches: the backbone's, and the experts'."""
        numbers = [f"expert {number + 1}" for number in range(self.num_experts)]
        return ("backbone", *(run.targets if self.start == "experts" else numbers))

    def reference(self, backbone: Callable[[], PreTrainedModel], device: torch.device) -> Reference:
        """Return a function to the backbone's states and head, computed by the model itself without its experts."""
        from mode.modular.block import bypass_experts
        from mode.ops.loss import compute_hidden_states, find_head

        def states(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
            with bypass_experts(model):
                return compute_hidden_states(model, rows), find_head(model)

        return states

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the modular model, with fresh experts or with those of the stage-1 runs."""
        import torch

        from mode.modular.artefact import load_experts, load_run_expert
        from mode.modular.block import find_blocks
        from mode.modular.experts import compose_experts
        from mode.modular.model import make_modular
        from mode.modular.solved_gates import ROWS, solve_gates

        composing = self.start == "experts"
        torch.manual_seed(run.seed)
        model: nn.Module = make_modular(
            material.backbone(),
            experts=self.names(run),
            num_blocks=self.num_blocks,
            expert_layers=self.expert_layers,
            init="copy" if composing else self.init,  # composed experts overwrite it; copying draws no numbers
            backbone_bias=self.backbone_bias,
            gate=self.gate,
            head_rank=self.head_rank,
            source=material.source,
        )
        if composing:
            experts: dict[str, Expert] = {
                domain: load_run_expert(folder / "expert", folder.name, domain)
                for domain, folder in zip(self.missing(run), material.needs, strict=True)
            }
            for folder in dict.fromkeys(self.at_hand().values()):
                experts |= load_experts(folder)
            for domain, digest in material.artefacts.items():
                if experts[domain].about["weights"] != digest:
                    raise ConfigError(f"method.experts: the expert for {domain} changed after the run began")
            compose_experts(model, [experts[domain].tensors for domain in run.targets], self.handover)
            if self.handover == "solved":
                solve_gates(model, material.read_texts(ROWS))
        for block in find_blocks(model):
            if self.alike:
                torch.nn.init.normal_(block.gate.weight, std=self.gate_noise)
            block.experts.requires_grad_(self.train_experts)
        return model

    def names(self, run: Run) -> tuple[str, ...]:
        """Return the experts' names: their domains, or numbered names where all train on the same mix."""
        if self.start == "experts" or (self.num_experts == 1 and len(run.targets) == 1):
            return run.targets
        return tuple(f"mix-{number + 1}" for number in range(self.num_experts))

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write a single-domain run's expert as an artefact, unless its gates have a hidden layer."""
        if not self.gate.hidden and self.start == "fresh" and self.num_experts == 1 and len(run.targets) == 1:
            from mode.modular.artefact import describe_fit, save_expert

            save_expert(model, folder / "expert", {"domain": run.targets[0], **describe_fit(self, self.gate), **about})

    def kept(self, folder: Path) -> Path:
        """Return the expert's weights, if the run has trained one for a single domain."""
        from mode.modular.artefact import TENSORS

        expert = folder / "expert" / TENSORS
        return expert if expert.exists() else super().kept(folder)
