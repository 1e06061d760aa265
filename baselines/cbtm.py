"""c-BTM (Gururangan et al., 2023): branch, train and merge over clusters of the text, which nobody has to name.

The targets' training rows are clustered by what tokens they have (tf-idf, its first 100 components, k-means with
clusters of one size), a copy of the backbone is fully fine-tuned on each cluster, and p(x_t | x_<t) = sum_j w_j
p_j(x_t | x_<t), w = softmax(- |z - centre_j|^2 / T) with z the place of x_<t; `top_k` keeps the nearest clusters.
Nothing trains after that.

Rows of a run's length are clustered, where it was documents, and all tokens of the backbone's vocabulary count, where
it was words without the most common ones and with one for all numbers.
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
from mode.cost.flops import Cost, add_flops, full_cost, untouched_cost
from mode.methods.base import Material, Method
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from mode.data.pack import Packed, Tokens

CLUSTERS = "clusters.safetensors"
"""File of a branch: vectors of the tokens, and centres."""


@settings(frozen=True, kw_only=True, config=STRICT)
class Branch(Method):
    """Full fine-tuning on one cluster of the targets' rows.

    Attributes:
        num_clusters: K.
        cluster: Which of them, from 0.
    """

    recorded_as: ClassVar[str] = "baselines.cbtm.Branch"

    num_clusters: Annotated[int, Field(gt=0)]
    cluster: Annotated[int, Field(ge=0)]

    def __post_init__(self) -> None:
        if self.cluster >= self.num_clusters:
            raise ValueError(f"cluster={self.cluster}: num_clusters={self.num_clusters} are counted from 0")

    def mixture(self, run: Run) -> dict[str, int]:
        """Return the only source of rows: the cluster."""
        return {f"cluster-{self.cluster}": 1}

    def stream(self, run: Run, packed: Mapping[str, Packed], name: str) -> Tokens | None:
        """Return the rows of the cluster, one after the other."""
        import numpy as np

        rows, _, _, members = clusters(self, run, packed)
        stream: Tokens = rows[np.asarray(members) == self.cluster].reshape(-1)
        return stream

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with every parameter trainable."""
        model: nn.Module = material.backbone().requires_grad_(True)
        return model

    def cost(self, run: Run) -> Cost:
        """Return what full training takes."""
        return full_cost(read_shape(run.backbone), run.train.sequence_length)

    def save(self, model: nn.Module, run: Run, folder: Path, about: Mapping[str, Any]) -> None:
        """Write where the clusters are, for who weighs them."""
        from mode.core.tensors import save_tensors
        from mode.runs.prepare import prepare_run

        _, vectors, centres, _ = clusters(self, run, prepare_run(run).packed)
        save_tensors(folder / CLUSTERS, {"vectors": vectors, "centres": centres}, {})


@settings(frozen=True, kw_only=True, config=STRICT)
class CBTM(Method):
    """Branch, train, merge over clusters.

    Attributes:
        branch_lr: The rate at which a model trains on a cluster.
        num_clusters: K.
        temperature: T.
        top_k: Models that stay, the nearest first; all by default.
    """

    recorded_as: ClassVar[str] = "baselines.cbtm.CBTM"
    weighs_experts: ClassVar[bool] = True

    branch_lr: Annotated[float, Field(gt=0.0)]
    num_clusters: Annotated[int, Field(gt=0)]
    temperature: Annotated[float, Field(gt=0.0)]
    top_k: Annotated[int, Field(gt=0)] | None

    def unused(self) -> tuple[str, ...]:
        """Nothing trains here, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run per cluster; they share steps or operations as those by domain do."""
        stages = []
        for cluster in range(self.num_clusters):
            method = Branch(lr=self.branch_lr, num_clusters=self.num_clusters, cluster=cluster)
            names = [f"cluster-{number}" for number in range(self.num_clusters)]
            first = stages_by_domain(run, method, names, trains=False)[0]
            stages.append(replace_settings(first, targets=run.targets))
        return tuple(stages)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the models that are mixed."""
        return tuple(f"cluster {number + 1}" for number in range(self.num_clusters))

    def steps(self, run: Run) -> int:
        """Return 0: what trains are the stages before."""
        return 0

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the models as one."""
        from mode.core.tensors import load_tensors
        from mode.moe.clusters import ClusterWeights
        from mode.moe.ensemble import Ensemble

        members = [material.backbone().requires_grad_(False) for _ in material.needs]
        for member, folder in zip(members, material.needs, strict=True):
            member.load_state_dict(load_tensors(folder / WEIGHTS)[0], strict=False)  # a tied head has one name
        found, _ = load_tensors(material.needs[0] / CLUSTERS)
        judge = ClusterWeights(found["vectors"], found["centres"], self.temperature, Choice(top_k=self.top_k))
        mixture: nn.Module = Ensemble(members, judge)
        return mixture

    def cost(self, run: Run) -> Cost:
        """Return what a forward pass of all models takes; nothing trains."""
        one = untouched_cost(read_shape(run.backbone), run.train.sequence_length)
        total = self.num_clusters * one.total
        flops = add_flops([one.flops] * self.num_clusters)
        return Cost(flops=flops, total=total, trainable=0, added=total - one.total, active=total)


def clusters(branch: Branch, run: Run, packed: Mapping[str, Packed]) -> tuple[Any, Any, Any, list[int]]:
    """Return the targets' training rows, the tokens' vectors, the centres, and the cluster of every row."""
    from mode.moe.clusters import cut_rows, find_clusters

    rows = cut_rows([packed[name].split("train").tokens for name in run.targets], run.train.sequence_length)
    vectors, centres, members = find_clusters(rows, branch.num_clusters, branch.tokenizer(run).vocab_size)
    return rows, vectors, centres, members
