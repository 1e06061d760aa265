"""FlexOlmo (Shi et al., 2025): feed-forward experts that are trained one domain at a time beside a frozen public model.

An expert trains in a mixture of two. In every decoder layer the feed-forward part of the backbone, frozen, stands
beside a trainable copy, with weights softmax(r_pub x, r_i x + min(b_i, 0)). The backbone's row of the router, r_pub, is
frozen too. The expert's row r_i begins as the mean embedding of the domain's text. The bias b_i can only prefer the
backbone. All experts then stand in one mixture with `top_k` experts per token: rows and biases are joined, and nothing
trains. With `tune_router` the routers train on the mix afterwards.

`Expert.shared` says which of the weights that experts share train with an expert, as in the sequel BAR (Morrison et
al., 2026). They are then averaged over the experts.

The published embedder is a model of its own, with the backbone's hidden size. Here an embedding is the mean of the
backbone's last hidden states. The public text is sampled from the backbone, so no text of its pretraining is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Flops, Shape, count_weights, read_shape
from mode.config.base import STRICT
from mode.config.check import build_method
from mode.config.method import SELF, RouterSettings
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, add_flops
from mode.methods.base import Material, Method
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from mode.moe.feed_forward import FeedForwardBank

PUBLIC = "public.safetensors"
"""File of an expert's run: the frozen row of the routers."""


ROUTER = ("weight", "offset")
"""Names of the trained tensors of a router."""


ROWS = 64
"""Maximum number of rows of a domain that an embedding is the mean of."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Expert(Method):
    """A feed-forward expert beside the frozen backbone.

    Attributes:
        router: Settings of the routers. Both experts run on every token.
        shared: Which other weights train: none, those outside of the layers, or all.
    """

    recorded_as: ClassVar[str] = "baselines.flex_olmo.Expert"
    family: ClassVar[str] = "mixtures from dense models"
    source: ClassVar[str] = "Shi et al., 2025"
    identical_at_start: ClassVar[bool] = True
    weighs_experts: ClassVar[bool] = True

    router: RouterSettings
    shared: Literal["none", "embeddings", "all"]

    def __post_init__(self) -> None:
        if self.router.active is not None or not self.router.known:
            raise ValueError("router: both experts run, so top_k and top_p must be null and sample false")

    def old_text(self, run: Run) -> tuple[str, ...]:
        """Return the sources of old text: replay, and the sampled rows that stand for the public text."""
        return (*super().old_text(run), SELF)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the two experts."""
        return "backbone", run.targets[0] if len(run.targets) == 1 else "mix"

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the mixture of two."""
        import torch

        from mode.gating.router import AnchoredRouter
        from mode.moe.feed_forward import insert_feed_forward_banks

        model = material.backbone().requires_grad_(False)
        sampled, *own_texts = material.read_texts(ROWS)
        public, own = embed_texts(model, (sampled, torch.cat(own_texts)))
        if self.shared != "none":
            model.requires_grad_(True)
        if self.shared == "embeddings":
            for layer in list_layers(model):
                layer.requires_grad_(False)
        for bank in insert_feed_forward_banks(model, [None, None], self.router):
            bank.router = AnchoredRouter(public, own[None], self.router)
            bank.experts[0].requires_grad_(False)
            bank.experts[1].requires_grad_(True)
        pair: nn.Module = model
        return pair

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the frozen row of the routers. The mixture reads it."""
        from mode.core.tensors import save_run_tensors

        path, _ = next(list_banks(model))
        row = model.get_parameter(f"{path}.router.anchor").detach()
        save_run_tensors(folder / PUBLIC, {"public": row}, str(about["run"]))

    def cost(self, run: Run) -> Cost:
        """Return the cost of training the expert. Sampling and embeddings are not counted."""
        shape = read_shape(run.backbone)
        flops = count_flops(shape, run.train.sequence_length, 1, 2, trains="experts", shared=self.shared)
        parts = sum(layer.feed_forward for layer in shape.layers)
        outside = shape.parameters - sum(layer.parameters for layer in shape.layers)
        trained = {"none": 0, "embeddings": outside, "all": shape.parameters - parts}[self.shared]
        added = parts + len(shape.layers) * (2 * shape.hidden + 1)
        total = shape.parameters + added
        return Cost(
            flops=flops,
            total=total,
            trainable=trained + added - len(shape.layers) * shape.hidden,
            added=added,
            active=total,
        )


@settings(frozen=True, kw_only=True, config=STRICT)
class FlexOlmo(Method):
    """A mixture of the backbone and of experts that were each trained beside it.

    Attributes:
        expert: The method that trains an expert on a domain, as in its YAML.
        router: Settings of the routers of the mixture.
        tune_router: Whether the routers train on the mix.
    """

    recorded_as: ClassVar[str] = "baselines.flex_olmo.FlexOlmo"
    family: ClassVar[str] = "mixtures from dense models"
    source: ClassVar[str] = "Shi et al., 2025"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    expert: dict[str, Any]
    router: RouterSettings
    tune_router: bool

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: without `tune_router` nothing trains in this stage."""
        return () if self.tune_router else ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run of an expert per target."""
        return stages_by_domain(run, build_method(self.expert, "method.expert"), run.targets, trains=self.tune_router)

    def steps(self, run: Run) -> int:
        """Return the steps of the routers' training: 0 without `tune_router`."""
        return super().steps(run) if self.tune_router else 0

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the experts."""
        return "backbone", *run.targets

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the mixture.

        Raises:
            ConfigError: `expert` does not train an expert beside the backbone.
        """
        import torch

        from mode.core.tensors import load_run_tensors
        from mode.gating.router import AnchoredRouter
        from mode.moe.feed_forward import insert_feed_forward_banks

        if not isinstance(build_method(self.expert, "method.expert"), Expert):
            raise ConfigError(f"method.expert._target_={self.expert['_target_']}: not {Expert.recorded_as}")
        model = material.backbone().requires_grad_(False)
        states = [load_run_tensors(folder / WEIGHTS, folder.name) for folder in material.needs]
        first = material.needs[0]
        public = load_run_tensors(first / PUBLIC, first.name)["public"]
        model.load_state_dict(average_shared(states), strict=False)
        parts = [{name.replace(".experts.1.", "."): value for name, value in state.items()} for state in states]
        own = [{name: value for name, value in part.items() if ".router." not in name} for part in parts]
        insert_feed_forward_banks(model, [None, *own], self.router)
        for path, bank in list_banks(model):
            rows, offsets = (torch.cat([state[f"{path}.router.{name}"] for state in states]) for name in ROUTER)
            router = AnchoredRouter(public, rows, self.router)
            with torch.no_grad():
                router.offset.copy_(offsets)
            bank.requires_grad_(False)
            bank.router = router.requires_grad_(self.tune_router)
        mixture: nn.Module = model
        return mixture

    def cost(self, run: Run) -> Cost | None:
        """Return the cost of the mixture; None if the number of experts per token is not fixed (`router.top_p`)."""
        if not self.router.known:
            return None
        shape, count = read_shape(run.backbone), len(run.targets)
        active = min(self.router.active or count + 1, count + 1)
        trains: Literal["routers", "nothing"] = "routers" if self.tune_router else "nothing"
        flops = count_flops(shape, run.train.sequence_length, active - 1, count + 1, trains=trains, shared="none")
        sizes, routers = sum(layer.feed_forward for layer in shape.layers), (count + 1) * shape.hidden + count
        added = count * sizes + len(shape.layers) * routers
        return Cost(
            flops=flops,
            total=shape.parameters + added,
            trainable=self.tune_router * len(shape.layers) * routers,
            added=added,
            active=shape.parameters + added - (count + 1 - active) * sizes,
        )


def count_flops(
    shape: Shape,
    length: int,
    beside: int,
    rows: int,
    *,
    trains: Literal["experts", "routers", "nothing"],
    shared: Literal["none", "embeddings", "all"],
) -> Flops:
    """Return the operations per token of a mixture in which the backbone's feed-forward part is frozen.

    Args:
        shape: Shape of the backbone.
        length: Tokens per row.
        beside: Number of other experts that a token runs.
        rows: Number of rows of a router.
        trains: What trains besides shared weights.
        shared: Which of the weights that experts share train.
    """
    flows, all_trains = trains != "nothing", shared == "all"
    parts = [shape.head(trains=shared != "none", upstream=flows)]
    for number, layer in enumerate(shape.layers):
        upstream = flows and (number > 0 or shared != "none")
        into, out = (2.0 * count_weights(stage) for stage in layer.stages[2:])
        feed_forward, router = into + out, 2.0 * shape.hidden * rows
        attention = 2.0 * layer.weights - feed_forward
        inputs = feed_forward if upstream else out  # the gradient of the output matrix's input is needed in any case
        frozen = feed_forward * upstream
        parts += [
            Flops(attention, attention * (upstream + all_trains)),
            layer.attention(length, passes=upstream or all_trains),
            Flops(feed_forward, frozen),
            Flops(beside * feed_forward, beside * (inputs + feed_forward) if trains == "experts" else beside * frozen),
            Flops(router, router * (upstream + flows)),
        ]
    return add_flops(parts)


def embed_texts(model: nn.Module, texts: Sequence[Tensor]) -> list[Tensor]:
    """Return the embedding of each text, (d,): the mean of a model's last hidden states, scaled to unit length.

    Args:
        model: A causal LM.
        texts: Rows of tokens, (N, S) each.
    """
    import torch
    from torch.nn import functional

    from mode.ops.loss import compute_hidden_states

    model.eval()
    with torch.no_grad():
        states = [torch.stack([compute_hidden_states(model, row[None])[0].mean(0) for row in rows]) for rows in texts]
    return [functional.normalize(each.float().mean(0), dim=0) for each in states]


def average_shared(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over experts' runs of the trained weights that are neither of an expert nor of a router."""
    import torch

    names = [name for name in states[0] if ".experts." not in name and ".router." not in name]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in names}


def list_banks(model: nn.Module) -> Iterator[tuple[str, FeedForwardBank]]:
    """Return the banks of experts of a model, by path."""
    from mode.moe.feed_forward import FeedForwardBank

    return ((path, module) for path, module in model.named_modules() if isinstance(module, FeedForwardBank))


def list_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model."""
    from mode.backbone.structure import find_layer_stack

    trunk, name = find_layer_stack(model)
    return list(getattr(trunk, name))
