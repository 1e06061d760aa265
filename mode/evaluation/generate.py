"""Generate text token by token, with the branch weights of a modular model's gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mode.backbone.tokenizer import BackboneTokenizer
from mode.core.errors import ConfigError
from mode.gating.meter import read_token_gates, watch_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
        max_tokens: Largest number of new tokens.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_p: Probability mass of the candidates: the fewest most likely tokens that reach it (nucleus sampling).
        seed: Seed of the random choices.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Piece:
    """A token of the output.

    Attributes:
        text: Text that the token adds; empty while a character is incomplete.
        gates: Gate weights of the token's prediction: for each block, one weight per branch; empty without gates.
    """

    text: str
    gates: tuple[tuple[float, ...], ...]

    @property
    def branch(self) -> int:
        """The branch with the largest weight over all blocks; 0 is the backbone."""
        totals = [sum(weights) for weights in zip(*self.gates, strict=True)] if self.gates else [1.0]
        return totals.index(max(totals))


def generate(
    model: PreTrainedModel,
    tokenizer: BackboneTokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    cached: bool = True,
    cut: bool = False,
) -> Iterator[Piece]:
    """Continue a prompt until a token that ends a text or the limit.

    Args:
        model: A causal LM with a key-value cache.
        tokenizer: Tokenizer of the model.
        prompt: Text to continue. An empty prompt starts a document.
        sampling: Settings of sampling.
        cached: Whether to use a key-value cache. Otherwise every step recomputes all earlier tokens.
        cut: Whether a prompt that is too long for the model's context is cut at its beginning.

    Returns:
        The tokens. Each is generated when it is asked for.

    Raises:
        ConfigError: Prompt and new tokens do not fit in the model's context, or the prompt is not valid UTF-8.
    """
    ids = fit_prompt(tokenizer, prompt, count_context(model), sampling.max_tokens, cut=cut)
    return continue_tokens(model, tokenizer, ids, sampling, cached=cached)


@torch.no_grad()
def continue_tokens(
    model: PreTrainedModel, tokenizer: BackboneTokenizer, ids: list[int], sampling: Sampling, *, cached: bool
) -> Iterator[Piece]:
    """Yield the tokens that continue the tokens of a prompt. See `generate`."""
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(sampling.seed)
    step, cache, shown = torch.tensor([ids], device=device), None, tokenizer.decode(ids)
    with watch_gates(model) as latest:
        for _ in range(sampling.max_tokens):
            out: Any = model(input_ids=step, past_key_values=cache, use_cache=cached, logits_to_keep=1)
            cache = out.past_key_values
            token = choose_token(out.logits[0, -1].float(), sampling, random)
            if token in tokenizer.ends:
                return
            ids.append(token)
            text = decode_addition(tokenizer, ids, shown)
            shown += text
            yield Piece(text, tuple(tuple(weights[0, -1].tolist()) for weights in latest))
            new = torch.tensor([[token]], device=device)
            step = new if cached else torch.cat([step, new], dim=1)


def fit_prompt(tokenizer: BackboneTokenizer, prompt: str, context: int, max_tokens: int, *, cut: bool) -> list[int]:
    """Return the tokens of a prompt that leaves room for new tokens in the context.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Text to continue.
        context: Context length of the model.
        max_tokens: Largest number of new tokens.
        cut: Whether a prompt that is too long is cut at its beginning, after the beginning-of-sequence token.

    Raises:
        ConfigError: There is no room.
    """
    ids = tokenizer.encode([prompt])[0] or [tokenizer.eos_id]
    room = context - max_tokens
    if len(ids) <= room:
        return ids
    begin = ids[:1] if ids[0] == tokenizer.bos_id else []
    if cut and room > len(begin):
        return [*begin, *ids[len(begin) - room :]]
    if len(ids) >= context:
        raise ConfigError(f"the prompt has {len(ids)} tokens, and this model reads {context}; shorten the prompt")
    raise ConfigError(
        f"the prompt has {len(ids)} tokens and max_tokens is {max_tokens}, but this model reads {context} tokens; "
        f"max_tokens can be up to {context - len(ids)}"
    )


def decode_addition(tokenizer: BackboneTokenizer, ids: Sequence[int], shown: str) -> str:
    """Return the text that the last token adds to the text shown so far; empty while a character is incomplete.

    All tokens from the beginning of the text are decoded together, because some decoders drop the first space.
    """
    text = tokenizer.decode(list(ids))[len(shown) :]
    return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text


def score_text(model: PreTrainedModel, tokenizer: BackboneTokenizer, ids: Sequence[int]) -> list[Piece]:
    """Return the tokens of a text with the gate weights of their predictions. The first token has no weights.

    Args:
        model: A model with gates.
        tokenizer: Tokenizer of the model.
        ids: Tokens of the text.
    """
    pieces, shown = [], ""
    gates = [(), *read_token_gates(model, list(ids)).tolist()]
    for number, weights in enumerate(gates):
        text = decode_addition(tokenizer, ids[: number + 1], shown)
        shown += text
        pieces.append(Piece(text, tuple(tuple(row) for row in weights)))
    return pieces


def count_context(model: PreTrainedModel) -> int:
    """Return the context length of a model in tokens; a very large number if the configuration has no limit."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else 1 << 30


def choose_token(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Choose the next token.

    Args:
        logits: Logits of the next token, (V,).
        sampling: Settings of sampling.
        random: Generator of the random choice.

    >>> choose_token(torch.tensor([0.0, 2.0, 1.0]), Sampling(), torch.Generator())
    1
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    ordered, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=random)])
