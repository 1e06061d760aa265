"""Continue many prompts greedily, several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mode.backbone.tokenizer import BackboneTokenizer
from mode.evaluation.generate import count_context, decode_addition, fit_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 16
"""Prompts of a batch. A step of decoding reads all weights, whatever the number of rows."""


@dataclass
class Completion:
    """A prompt and its continuation so far.

    Attributes:
        number: Index of the prompt.
        ids: Tokens of the prompt and of the continuation.
        prompt_tokens: Number of tokens of the prompt.
        shown: Text of all tokens.
        text: Text of the continuation.
        ended: Whether the continuation is complete.
    """

    number: int
    ids: list[int]
    prompt_tokens: int
    shown: str
    text: str = ""
    ended: bool = False

    def add(self, token: int, tokenizer: BackboneTokenizer, max_tokens: int, stop: Sequence[str]) -> None:
        """Add a token of the continuation, which ends at a token that ends a text, a stop text or the limit."""
        if token in tokenizer.ends:
            self.ended = True
            return
        self.ids.append(token)
        addition = decode_addition(tokenizer, self.ids, self.shown)
        self.shown += addition
        self.text += addition
        limit = self.prompt_tokens + max_tokens
        self.ended = len(self.ids) >= limit or any(end in self.text for end in stop)


def complete_prompts(
    model: PreTrainedModel,
    tokenizer: BackboneTokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    stop: Sequence[str],
    *,
    rows: int = ROWS,
) -> Iterator[tuple[int, str]]:
    """Continue prompts greedily. A prompt that is too long for the model's context is cut at its beginning.

    Prompts of similar length form a batch. There is no padding: all rows begin together, and a row with a longer prompt
    takes its next token from the prompt while others take the predicted one. A row's text is therefore that of the
    prompt alone, for every model with a key-value cache, up to the rounding of products of another shape.

    Args:
        model: A causal LM with a key-value cache, in evaluation mode.
        tokenizer: Tokenizer of the model.
        prompts: Texts to continue.
        max_tokens: Largest number of new tokens of a prompt.
        stop: Texts that end a continuation.
        rows: Prompts of a batch.

    Yields:
        The index of a prompt and its continuation with the stop text, as soon as it is complete.

    Raises:
        ConfigError: The context of the model is not longer than `max_tokens`, or a prompt is not valid UTF-8.
    """
    context = count_context(model)
    waiting = []
    for number, prompt in enumerate(prompts):
        ids = fit_prompt(tokenizer, prompt, context, max_tokens, cut=True)
        waiting.append(Completion(number, ids, len(ids), tokenizer.decode(ids)))
    waiting.sort(key=lambda each: each.prompt_tokens)
    for start in range(0, len(waiting), rows):
        for done in complete_batch(model, tokenizer, waiting[start : start + rows], max_tokens, stop):
            yield done.number, done.text


@torch.no_grad()
def complete_batch(
    model: PreTrainedModel,
    tokenizer: BackboneTokenizer,
    rows: Sequence[Completion],
    max_tokens: int,
    stop: Sequence[str],
) -> Iterator[Completion]:
    """Continue the prompts of one batch, the shortest first. Yield each when it is complete. See `complete_prompts`."""
    device = next(model.parameters()).device
    live, read = list(rows), rows[0].prompt_tokens
    step, cache = torch.tensor([row.ids[:read] for row in live], device=device), None
    while live:
        out: Any = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        for row, token in zip(live, out.logits[:, -1].float().argmax(-1).tolist(), strict=True):
            if read >= row.prompt_tokens:
                row.add(token, tokenizer, max_tokens, stop)
        kept = [index for index, row in enumerate(live) if not row.ended]
        yield from (row for row in live if row.ended)
        if kept and len(kept) < len(live):
            cache.batch_select_indices(torch.tensor(kept, device=device))
        live = [live[index] for index in kept]
        step = torch.tensor([[row.ids[read]] for row in live], device=device)
        read += 1
