"""Ensembles of models: p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t), with weights w that depend only on x_<t.

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
    find_head,
    find_hits,
    find_softcap,
    score_states,
)


class Ensemble(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # the library is untyped
    """Causal LMs of one shape whose probabilities are mixed. Mixed logits would give another most likely token.

    The layers of all members share one key-value cache, in which every layer has its own slot. The last slot holds the
    evidence of the judge for the tokens so far. Therefore the library's `generate` works, including beam search.

    Attributes:
        members: The models.
        judge: Computes the members' weights from their likelihoods of the text so far, or from the distances of the
            text to clusters; None for equal weights.
        depth: Number of layers of a member.
        looks_back: Whether a prediction depends on earlier tokens of the row by other means than attention.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, members: Sequence[PreTrainedModel], judge: Posterior | ClusterWeights | None) -> None:
        """Store the members and size the key-value cache.

        Args:
            members: Models with the same configuration.
            judge: Computes the members' weights; None for equal weights.
        """
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
        """Return the log-probabilities of next tokens as logits, (B, S or `logits_to_keep`, V).

        Args:
            input_ids: Tokens, (B, S).
            attention_mask: Which of the tokens so far are text, or None.
            past_key_values: Key-value cache.
            use_cache: Whether to make a cache if there is none.
            logits_to_keep: Number of last positions, or their indices; 0 keeps all.
            options: Further arguments of the decoders.
        """
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        states = self.compute_states(input_ids, cache, attention_mask=attention_mask, **options)
        evidence = self.collect_evidence(states, input_ids, attention_mask, cache)
        weights = self.weigh(evidence)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        pieces = [member[:, kept].float() for member in states]
        logits = mix_probabilities(self.compute_log_probabilities(pieces), weights[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def compute_states(self, input_ids: Tensor, cache: Cache | None = None, **options: Any) -> list[Tensor]:
        """Return every member's final hidden states, each (B, S, d)."""
        options |= {} if cache is None else {"use_cache": True}
        return [
            compute_hidden_states(member, input_ids, past_key_values=self.select_slots(cache, number), **options)
            for number, member in enumerate(self.members)
        ]

    def select_slots(self, cache: Cache | None, number: int) -> Cache | None:
        """Return a cache with a member's slots. The slots are shared with the whole cache, not copied."""
        if cache is None:
            return None
        return Cache(layers=cache.layers[number * self.depth : (number + 1) * self.depth])

    def collect_evidence(
        self, states: Sequence[Tensor], input_ids: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Return the evidence of the judge for every prefix that ends with a given token, in fp64.

        For a posterior, the evidence is every member's log-likelihood of the prefix or of the window at its end,
        (B, S, N). For clusters, it is the sum of the vectors of the prefix's tokens, (B, S, c). Padding adds nothing.
        A row's first token has no likelihood, because no token predicts it.

        Args:
            states: Final hidden states of the members for the given tokens, each (B, S, d).
            input_ids: The given tokens, (B, S).
            mask: Which of the tokens so far are text, or None.
            cache: Cache with the evidence of earlier tokens. The evidence of the given tokens is added to it.
        """
        if self.judge is None:
            return torch.zeros(*input_ids.shape, len(states), dtype=torch.float64, device=input_ids.device)
        slot = len(states) * self.depth
        joined = torch.cat([member.float() for member in states], -1)
        if isinstance(self.judge, ClusterWeights):
            evidence = self.judge.vectors[input_ids].double()
            text = mask
        else:
            before = None if cache is None or not cache.get_seq_length(slot) else cache.layers[slot].keys[:, 0, -1:]
            evidence = self.compute_likelihoods(joined, input_ids, before)
            # A token counts only if the token before it, which predicts it, is text too.
            text = None if mask is None else nn.functional.pad(mask, (1, 0))[:, :-1] * mask
        if text is not None:
            evidence = evidence * text[:, -evidence.shape[1] :, None]
        if cache is not None:
            _, cached = cache.update(joined[:, None], evidence[:, None], slot)
            evidence = cast("Tensor", cached)[:, 0]
        return self.sum_evidence(evidence)[:, -input_ids.shape[1] :]

    def sum_evidence(self, evidence: Tensor) -> Tensor:
        """Map the evidence of tokens to that of the text so far at every token: sums, or those of a window."""
        return self.judge.sum_evidence(evidence) if isinstance(self.judge, Posterior) else evidence.cumsum(1)

    def compute_likelihoods(self, joined: Tensor, input_ids: Tensor, before: Tensor | None) -> Tensor:
        """Return every member's log-likelihood of tokens, (B, S, N).

        Args:
            joined: Final hidden states of all members, (B, S, N d).
            input_ids: The tokens, (B, S).
            before: Hidden states of the token before them, (B, 1, N d); None at the beginning of a row.
        """
        states = joined[:, :-1] if before is None else torch.cat([before, joined[:, :-1]], 1)
        targets = input_ids[:, 1:] if before is None else input_ids
        parts = [
            -score_states(part, find_head(member), targets, CHUNK, find_softcap(member)).nll.view(targets.shape)
            for member, part in zip(self.members, states.chunk(len(self.members), -1), strict=True)
        ]
        likelihoods = torch.stack(parts, -1).double()
        return nn.functional.pad(likelihoods, (0, 0, 1, 0)) if before is None else likelihoods

    def weigh(self, evidence: Tensor) -> Tensor:
        """Return the members' weights after each token, (B, S, N), from the evidence of the token's prefix."""
        if self.judge is None:
            return torch.full_like(evidence, 1.0 / evidence.shape[-1])
        weights: Tensor = self.judge(evidence)
        return weights

    def compute_log_probabilities(self, states: Sequence[Tensor]) -> Tensor:
        """Return every member's log-probabilities of next tokens, (N, ..., V), from its final hidden states.

        They are computed in fp32: logits in bf16 would have ties.
        """
        parts = []
        with torch.autocast(states[0].device.type, enabled=False):
            for member, part in zip(self.members, states, strict=True):
                logits, cap = part @ find_head(member).float().T, find_softcap(member)
                parts.append((logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1))
        return torch.stack(parts)

    @torch.no_grad()
    def score_tokens(
        self, input_ids: Tensor, targets: Tensor, chunk: int = CHUNK, *, ranks: bool = False, **options: Any
    ) -> TokenScores:
        """Score every token of a batch, with the logits of one chunk of tokens in memory.

        Args:
            input_ids: Tokens, (B, S).
            targets: Next tokens, (B, S).
            chunk: Tokens per chunk.
            ranks: Whether to rank the right tokens too.
            options: Further arguments of the decoders.
        """
        flat = [member.flatten(0, 1).float() for member in self.compute_states(input_ids, **options)]
        labels, shape = targets.flatten(), (*targets.shape, len(flat))
        sums = self.judge.vectors[input_ids].double().cumsum(1) if isinstance(self.judge, ClusterWeights) else None
        likelihoods = torch.zeros(len(labels), len(flat), dtype=torch.float64, device=labels.device)
        nll, hit = torch.empty(len(labels), device=labels.device), torch.empty_like(labels, dtype=torch.bool)
        rank = torch.empty_like(labels) if ranks else None
        for start in range(0, len(labels), chunk):
            piece = slice(start, start + chunk)
            predictions = self.compute_log_probabilities([member[piece] for member in flat])
            columns = labels[piece, None]
            likelihoods[piece] = torch.stack([part.gather(1, columns)[:, 0] for part in predictions], -1).double()
            # Chunks follow the order of the rows, so the likelihoods of all earlier tokens of a row are known.
            evidence = self.sum_evidence(shift(likelihoods.view(shape))) if sums is None else sums
            weights = self.weigh(evidence).flatten(0, 1)[piece]
            scores = mix_probabilities(predictions, weights)
            nll[piece] = -scores.gather(1, columns)[:, 0]
            if rank is not None:
                rank[piece] = count_above(scores, labels[piece], out=torch.empty_like(scores))
            hit[piece] = find_hits(scores, labels[piece])
        return TokenScores(nll, hit, rank)


def shift(likelihoods: Tensor) -> Tensor:
    """Return for every token the likelihoods of the token before it in its row, (B, S, N); zeros for the first."""
    return nn.functional.pad(likelihoods, (0, 0, 1, 0))[:, :-1]


def mix_probabilities(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Return the log of the weighted mean of probabilities, (..., V).

    Args:
        log_probabilities: Log-probabilities of the members, (N, ..., V).
        weights: Weights of the members, (..., N).
    """
    logs = weights.log().movedim(-1, 0)[..., None].float()
    return (log_probabilities + logs).logsumexp(0)
