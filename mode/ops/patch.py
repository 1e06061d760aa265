"""A model whose layers compute some things as it is done here, on a processor, and not as `transformers` does."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from mode.ops.rms_norm import apply_rms_norm
from mode.ops.rotary import apply_rotary
from mode.ops.swiglu import apply_feed_forward

ROTARY = "apply_rotary_pos_emb"
"""Name of the function that turns queries and keys, in every module of `transformers` whose attention has one."""


class Patch:
    """A model on a processor that computes some things as it is done here, to the same bits, in its context.

    These are its rotary embeddings, its norms and its feed-forward layers.

    What is exchanged is the library's functions where their code is Llama's, as it is in most families, for all models
    of the family. They are for one backward pass: neither second derivatives nor `torch.func` go through them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find them among what the model is made of."""
        from transformers.models.llama import modeling_llama as llama

        on_processor = next(model.parameters()).device.type == "cpu"
        kinds = {type(module) for module in model.modules()} if on_processor else set()
        sources: set[Any] = {sys.modules[kind.__module__] for kind in kinds}
        found: list[tuple[Any, str, Any]] = [
            (source, ROTARY, apply_rotary)
            for source in sources
            if have_same_code(source, llama, ROTARY) and have_same_code(source, llama, "rotate_half")
        ]
        for own, ours in ((llama.LlamaRMSNorm, apply_rms_norm), (llama.LlamaMLP, apply_feed_forward)):
            found += [(kind, "forward", ours) for kind in kinds if have_same_code(kind, own, "forward")]
        self.places = [each for each in found if getattr(*each[:2]) is not each[2]]
        self.own = [vars(place).get(name) for place, name, _ in self.places]

    def __enter__(self) -> None:
        """Exchange the functions."""
        for place, name, ours in self.places:
            setattr(place, name, ours)

    def __exit__(self, *_: object) -> None:
        """Put the library's back."""
        for (place, name, _), own in zip(self.places, self.own, strict=True):
            if own is None:  # of another class that this one is a kind of
                delattr(place, name)
            else:
                setattr(place, name, own)


def have_same_code(one: Any, other: Any, name: str) -> bool:
    """Say whether two modules or classes have a function of the same name and code."""
    codes = [getattr(getattr(each, name, None), "__code__", None) for each in (one, other)]
    seen = [None if code is None else (code.co_code, code.co_names) for code in codes]
    return seen[0] == seen[1] is not None
