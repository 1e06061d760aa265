"""Models mixed in probability: p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t), with weights that know x_<t alone.

Shapes: N members, B rows, S tokens per row, d hidden size, V vocabulary size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mode.gating.router import Posterior
from mode.moe.clusters import ClusterWeights
from mode.ops.loss import (
    CHUNK,
    TokenScores,
    compute_hidden_states,
    count_above,
    find_hits,
    logit_softcap,
    output_head,
    score_states,
)


class Ensemble(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # the library is untyped
    """Causal LMs of one shape whose probabilities are mixed; never their logits, whose argmax is another.

    The layers of all members share one key-value cache: each has slots of its own, and the last slot holds what the
    judge needs of the tokens so far. So the library's `generate` works, with beams too.

    Attributes:
        members: The models.
        judge: Weights by how well each member predicted the text so far, or by what cluster it is nearest to; None for
            equal weights.
        looks_back: Whether a token's prediction depends on the row before it by other ways than attention.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, members: Sequence[PreTrainedModel], judge: Posterior | ClusterWeights | None) -> None:
        """Put models side by side."""
        first = members[0].config
        config = copy.deepcopy(first)
        config.num_hidden_layers = len(members) * first.num_hidden_layers + 1
        if kinds := getattr(first, "layer_types", None):
            config.layer_types = [*kinds * len(members), "full_attention"]
        super().__init__(config)
        self.members = nn.ModuleList(members)
        self.judge = judge
        self.depth: int = first.num_hidden_layers
        self.looks_back = judge is not None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return log-probabilities of next tokens as logits, (B, S or `logits_to_keep`, V)."""
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        states = self.states(input_ids, cache, attention_mask=attention_mask, **options)
        evidence = self.evidence(states, input_ids, attention_mask, cache)
        weights = self.weigh(evidence)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        pieces = [one[:, kept].float() for one in states]
        logits = mix_probabilities(self.log_probabilities(pieces), weights[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def states(self, input_ids: Tensor, cache: Cache | None = None, **options: Any) -> list[Tensor]:
        """Return every member's final hidden states, each (B, S, d)."""
        options |= {} if cache is None else {"use_cache": True}
        return [
            compute_hidden_states(member, input_ids, past_key_values=self.own_slots(cache, number), **options)
            for number, member in enumerate(self.members)
        ]

    def own_slots(self, cache: Cache | None, number: int) -> Cache | None:
        """Return a member's part of a cache, which holds the very same layers."""
        if cache is None:
            return None
        return Cache(layers=cache.layers[number * self.depth : (number + 1) * self.depth])

    def evidence(self, states: Sequence[Tensor], input_ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return what the judge goes by of each token's prefix, itself included, in fp64.

        It is the sum over the prefix's tokens of every member's log-likelihood of them, (B, S, N), or of their vectors,
        (B, S, c). Padding counts for nothing, and neither does a row's first token, which nothing predicts.

        Args:
            states: Final hidden states of the members on the tokens at hand.
            input_ids: Those tokens, (B, S).
            mask: Which of the tokens so far are text.
            cache: Holds what is known of the tokens before them, and takes in these.
        """
        if self.judge is None:
            return torch.zeros(*input_ids.shape, len(states), dtype=torch.float64, device=input_ids.device)
        slot = len(states) * self.depth
        joined = torch.cat([one.float() for one in states], -1)
        if isinstance(self.judge, ClusterWeights):
            clues = self.judge.vectors[input_ids].double()
            text = mask
        else:
            before = None if cache is None or not cache.get_seq_length(slot) else cache.layers[slot].keys[:, 0, -1:]
            clues = self.likelihoods(joined, input_ids, before)
            # A token counts where the one that predicts it is text too.
            text = None if mask is None else nn.functional.pad(mask, (1, 0))[:, :-1] * mask
        if text is not None:
            clues = clues * text[:, -clues.shape[1] :, None]
        if cache is None:
            return clues.cumsum(1)
        _, every = cache.update(joined[:, None], clues[:, None], slot)
        return cast("Tensor", every)[:, 0].cumsum(1)[:, -input_ids.shape[1] :]

    def likelihoods(self, joined: Tensor, input_ids: Tensor, before: Tensor | None) -> Tensor:
        """Return every member's log-likelihood of tokens, (B, S, N).

        Args:
            joined: Final hidden states of all members, (B, S, N d).
            input_ids: The tokens, (B, S).
            before: Hidden states of the token before them, (B, 1, N d); None at the beginning of a row.
        """
        known = joined[:, :-1] if before is None else torch.cat([before, joined[:, :-1]], 1)
        seen = input_ids[:, 1:] if before is None else input_ids
        found = [
            -score_states(part, output_head(member), seen, CHUNK, logit_softcap(member)).nll.view(seen.shape)
            for member, part in zip(self.members, known.chunk(len(self.members), -1), strict=True)
        ]
        likelihoods = torch.stack(found, -1).double()
        return nn.functional.pad(likelihoods, (0, 0, 1, 0)) if before is None else likelihoods

    def weigh(self, evidence: Tensor) -> Tensor:
        """Return the members' weights after each token, (B, S, N), from what is known of its prefix."""
        if self.judge is None:
            return torch.full_like(evidence, 1.0 / evidence.shape[-1])
        weights: Tensor = self.judge(evidence)
        return weights

    def log_probabilities(self, states: Sequence[Tensor]) -> Tensor:
        """Return every member's log-probabilities for its final hidden states, (N, ..., V)."""
        found = []
        for member, one in zip(self.members, states, strict=True):
            logits, cap = one @ output_head(member).float().T, logit_softcap(member)
            found.append((logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1))
        return torch.stack(found)

    @torch.no_grad()
    def token_scores(
        self, input_ids: Tensor, targets: Tensor, chunk: int = CHUNK, *, ranks: bool = False, **options: Any
    ) -> TokenScores:
        """Score every token of a batch, holding the logits of `chunk` tokens at a time.

        Args:
            input_ids: Tokens, (B, S).
            targets: Next tokens, (B, S).
            chunk: Tokens per chunk.
            ranks: Whether to rank the right tokens too.
            options: As the decoder's.
        """
        flat = [one.flatten(0, 1).float() for one in self.states(input_ids, **options)]
        labels, shape = targets.flatten(), (*targets.shape, len(flat))
        near = self.judge.vectors[input_ids].double().cumsum(1) if isinstance(self.judge, ClusterWeights) else None
        likelihoods = torch.zeros(len(labels), len(flat), dtype=torch.float64, device=labels.device)
        nll, hit = torch.empty(len(labels), device=labels.device), torch.empty_like(labels, dtype=torch.bool)
        rank = torch.empty_like(labels) if ranks else None
        for start in range(0, len(labels), chunk):
            piece = slice(start, start + chunk)
            found = self.log_probabilities([one[piece] for one in flat])
            wanted = labels[piece, None]
            likelihoods[piece] = torch.stack([one.gather(1, wanted)[:, 0] for one in found], -1).double()
            # Rows run on through the chunks, so all that comes before a chunk's tokens is known by now.
            evidence = shift_prefix_sums(likelihoods.view(shape)) if near is None else near
            weights = self.weigh(evidence).flatten(0, 1)[piece]
            scores = mix_probabilities(found, weights)
            nll[piece] = -scores.gather(1, wanted)[:, 0]
            if rank is not None:
                rank[piece] = count_above(scores, labels[piece], out=torch.empty_like(scores))
            hit[piece] = find_hits(scores, labels[piece])
        return TokenScores(nll, hit, rank)


def shift_prefix_sums(likelihoods: Tensor) -> Tensor:
    """Sum what was known before each token of a row: (B, S, N) to (B, S, N)."""
    return nn.functional.pad(likelihoods, (0, 0, 1, 0))[:, :-1].cumsum(1)


def mix_probabilities(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Return the log of the weighted mean of probabilities: (N, ..., V) and (..., N) to (..., V)."""
    logs = weights.log().movedim(-1, 0)[..., None].float()
    return (log_probabilities + logs).logsumexp(0)
