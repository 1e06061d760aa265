"""Replace some functions of `transformers` with faster equivalents on a CPU."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from mode.ops.rms_norm import apply_rms_norm
from mode.ops.rotary import apply_rotary
from mode.ops.swiglu import apply_feed_forward

ROTARY = "apply_rotary_pos_emb"
"""Name of the function that applies rotary embeddings, in the modules of `transformers` that have one."""


class Patch:
    """Context in which a model on a CPU uses this package's rotary embeddings, norms and feed-forward layers.

    The results are bit-identical. A function of the library is replaced if its code equals Llama's, as it does in most
    families. The replacement affects all models of the family. The replacements support one backward pass: neither
    second derivatives nor `torch.func` work with them. On other devices the context does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the functions to replace in the model's classes and their modules."""
        from transformers.models.llama import modeling_llama as llama

        on_cpu = next(model.parameters()).device.type == "cpu"
        kinds = {type(module) for module in model.modules()} if on_cpu else set()
        sources: set[Any] = {sys.modules[kind.__module__] for kind in kinds}
        patches: list[tuple[Any, str, Any]] = [
            (source, ROTARY, apply_rotary)
            for source in sources
            if have_same_code(source, llama, ROTARY) and have_same_code(source, llama, "rotate_half")
        ]
        for original, new in ((llama.LlamaRMSNorm, apply_rms_norm), (llama.LlamaMLP, apply_feed_forward)):
            patches += [(kind, "forward", new) for kind in kinds if have_same_code(kind, original, "forward")]
        self.patches = [patch for patch in patches if getattr(*patch[:2]) is not patch[2]]
        self.originals = [vars(owner).get(name) for owner, name, _ in self.patches]

    def __enter__(self) -> None:
        """Replace the library's functions."""
        for owner, name, new in self.patches:
            setattr(owner, name, new)

    def __exit__(self, *_: object) -> None:
        """Restore the library's functions."""
        for (owner, name, _), original in zip(self.patches, self.originals, strict=True):
            if original is None:  # inherited from a base class
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def have_same_code(one: Any, other: Any, name: str) -> bool:
    """Return whether two modules or classes both have a function of this name, with the same code."""
    functions = [getattr(getattr(owner, name, None), "__code__", None) for owner in (one, other)]
    codes = [None if code is None else (code.co_code, code.co_names) for code in functions]
    return codes[0] == codes[1] is not None
