"""c-BTM (Gururangan et al., 2023): Branch-Train-Merge over clusters of the text, without domain labels.

The training rows of the targets are clustered by their tokens: tf-idf, projection to the first 100 components, and
k-means with clusters of equal size. A copy of the backbone is fully fine-tuned on each cluster. The mixture is
p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t), w = softmax(- |z - centre_j|^2 / T), where z is the embedding of x_<t.
`top_k` keeps the nearest clusters. Nothing trains after the branches.

This implementation clusters rows of the sequence length; the paper clusters documents. tf-idf counts all tokens of the
backbone's vocabulary; the paper counts words, without the most common words and with one entry for all numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.method import Choice
from mode.config.run import Run
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, add_flops, compute_full_cost, compute_untouched_cost
from mode.methods.base import Material, Method
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from mode.data.pack import Packed, Tokens

CLUSTERS = "clusters.safetensors"
"""File of a branch: vectors of the tokens, and centres of the clusters."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Branch(Method):
    """Full fine-tuning on one cluster of the targets' rows.

    Attributes:
        num_clusters: Number of clusters, K.
        cluster: Number of the cluster to train on, from 0.
    """

    recorded_as: ClassVar[str] = "baselines.cbtm.Branch"
    family: ClassVar[str] = "models apart"
    source: ClassVar[str] = "Gururangan et al., 2023"

    num_clusters: Annotated[int, Field(gt=0)]
    cluster: Annotated[int, Field(ge=0)]

    def __post_init__(self) -> None:
        if self.cluster >= self.num_clusters:
            raise ValueError(f"cluster={self.cluster}: num_clusters={self.num_clusters}, numbered from 0")

    def mixture(self, run: Run) -> dict[str, int]:
        """Return the cluster as the only source of rows."""
        return {f"cluster-{self.cluster}": 1}

    def old_text(self, run: Run) -> tuple[str, ...]:
        """Return nothing: the rows of the cluster are those of the targets."""
        return ()

    def stream(self, run: Run, packed: Mapping[str, Packed], name: str) -> Tokens | None:
        """Return the rows of the cluster as one stream of tokens."""
        import numpy as np

        rows, _, _, members = cluster_rows(self, run, packed)
        stream: Tokens = rows[np.asarray(members) == self.cluster].reshape(-1)
        return stream

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with every parameter trainable."""
        model: nn.Module = material.backbone().requires_grad_(True)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost of full fine-tuning."""
        return compute_full_cost(read_shape(run.backbone), run.train.sequence_length)

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the vectors of tokens and the centres of clusters. The mixture reads them."""
        from mode.core.tensors import save_run_tensors
        from mode.runs.prepare import prepare_run

        _, vectors, centres, _ = cluster_rows(self, run, prepare_run(run).packed)
        save_run_tensors(folder / CLUSTERS, {"vectors": vectors, "centres": centres}, str(about["run"]))


@settings(frozen=True, kw_only=True, config=STRICT)
class CBTM(Method):
    """Branch, train, merge over clusters.

    Attributes:
        branch_lr: Learning rate of the training on a cluster.
        num_clusters: Number of clusters, K.
        temperature: Temperature of the weights, T.
        top_k: Number of nearest clusters to keep per token; None for all.
    """

    recorded_as: ClassVar[str] = "baselines.cbtm.CBTM"
    family: ClassVar[str] = "models apart"
    source: ClassVar[str] = "Gururangan et al., 2023"
    weighs_experts: ClassVar[bool] = True

    branch_lr: Annotated[float, Field(gt=0.0)]
    num_clusters: Annotated[int, Field(gt=0)]
    temperature: Annotated[float, Field(gt=0.0)]
    top_k: Annotated[int, Field(gt=0)] | None

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: nothing trains in this stage, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run per cluster. The runs share steps or operations as runs by domain do."""
        stages = []
        for cluster in range(self.num_clusters):
            method = Branch(lr=self.branch_lr, num_clusters=self.num_clusters, cluster=cluster)
            names = [f"cluster-{number}" for number in range(self.num_clusters)]
            first = stages_by_domain(run, method, names, trains=False)[0]
            stages.append(replace_settings(first, targets=run.targets))
        return tuple(stages)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the models in the mixture."""
        return tuple(f"cluster {number + 1}" for number in range(self.num_clusters))

    def steps(self, run: Run) -> int:
        """Return 0: only the earlier stages train."""
        return 0

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the mixture of the models."""
        from mode.core.tensors import load_run_tensors
        from mode.moe.clusters import ClusterWeights
        from mode.moe.ensemble import Ensemble

        members = [material.backbone().requires_grad_(False) for _ in material.needs]
        for member, folder in zip(members, material.needs, strict=True):
            state = load_run_tensors(folder / WEIGHTS, folder.name, dict(member.named_parameters()))
            member.load_state_dict(state, strict=False)  # a tied head has one name
        first = material.needs[0]
        tensors = load_run_tensors(first / CLUSTERS, first.name)
        weights = ClusterWeights(tensors["vectors"], tensors["centres"], self.temperature, Choice(top_k=self.top_k))
        mixture: nn.Module = Ensemble(members, weights)
        return mixture

    def cost(self, run: Run) -> Cost:
        """Return the cost of a forward pass of all models. Nothing trains."""
        one = compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length)
        total = self.num_clusters * one.total
        flops = add_flops([one.flops] * self.num_clusters)
        return Cost(flops=flops, total=total, trainable=0, added=total - one.total, active=total)


def cluster_rows(branch: Branch, run: Run, packed: Mapping[str, Packed]) -> tuple[Any, Any, Any, list[int]]:
    """Cluster the training rows of the targets; return rows, token vectors, centres, and the cluster of every row."""
    from mode.moe.clusters import cut_rows, find_clusters

    rows = cut_rows([packed[name].split("train").tokens for name in run.targets], run.train.sequence_length)
    vectors, centres, members = find_clusters(rows, branch.num_clusters, branch.tokenizer(run).vocab_size)
    return rows, vectors, centres, members
