"""Text from a model, token by token, with the branches that its gates chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mode.backbone.tokenizer import BackboneTokenizer
from mode.gating.meter import read_token_gates, watch_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: Tokens to make at most.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Share of probability that the candidates hold.
        seed: Seeds the choice.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Piece:
    """A token of the output.

    Attributes:
        text: What the token adds to the text; empty while a character is not whole yet.
        gates: Weights with which it was predicted: per block, one per branch; empty without gates.
    """

    text: str
    gates: tuple[tuple[float, ...], ...]

    @property
    def branch(self) -> int:
        """The branch with the largest weight over all blocks; 0 is the backbone."""
        totals = [sum(weights) for weights in zip(*self.gates, strict=True)] if self.gates else [1.0]
        return totals.index(max(totals))


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: BackboneTokenizer, prompt: str, sampling: Sampling, *, cached: bool = True
) -> Iterator[Piece]:
    """Continue a prompt until the end-of-sequence token, yielding each token as it is made.

    Args:
        model: A causal LM with a key-value cache.
        tokenizer: Its tokenizer.
        prompt: The text to continue; an empty one starts a document.
        sampling: How to choose.
        cached: Whether to keep keys and values; else every token reads all before it anew.
    """
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(sampling.seed)
    ids = tokenizer.encode([prompt])[0] or [tokenizer.eos_id]
    window = max(1, count_context(model) - sampling.max_tokens)
    step, cache, made, shown = torch.tensor([ids[-window:]], device=device), None, [], ""
    with watch_gates(model) as latest:
        for _ in range(sampling.max_tokens):
            out: Any = model(input_ids=step, past_key_values=cache, use_cache=cached, logits_to_keep=1)
            cache = out.past_key_values
            token = choose_token(out.logits[0, -1].float(), sampling, random)
            if token == tokenizer.eos_id:
                return
            made.append(token)
            fresh = decode_addition(tokenizer, made, shown)
            shown += fresh
            yield Piece(fresh, tuple(tuple(weights[0, -1].tolist()) for weights in latest))
            new = torch.tensor([[token]], device=device)
            step = new if cached else torch.cat([step, new], dim=1)


def decode_addition(tokenizer: BackboneTokenizer, ids: Sequence[int], shown: str) -> str:
    """Return what the last token adds to the text shown so far; nothing while a character is not whole yet."""
    text = tokenizer.decode(list(ids))
    return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(shown) :]


def score_text(model: PreTrainedModel, tokenizer: BackboneTokenizer, ids: Sequence[int]) -> list[Piece]:
    """Return the tokens of a text with the weights that predicted each; the first was predicted by none."""
    pieces, shown = [], ""
    gates = [(), *read_token_gates(model, list(ids)).tolist()]
    for number, weights in enumerate(gates):
        fresh = decode_addition(tokenizer, ids[: number + 1], shown)
        shown += fresh
        pieces.append(Piece(fresh, tuple(tuple(row) for row in weights)))
    return pieces


def count_context(model: PreTrainedModel) -> int:
    """Return how many tokens a model is made to read."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else 1 << 30


def choose_token(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Choose the next token from its logits, (V,).

    >>> choose_token(torch.tensor([0.0, 2.0, 1.0]), Sampling(), torch.Generator())
    1
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    ordered, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=random)])
