"""The state of the slots that decode together, on the device: a step changes it in place and asks the host nothing.

Legend: B slots, L most sampled tokens of a rollout, V vocabulary, C token classes, S states of the grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datastore import harmony_grammar
from datastore.types import SPAN_FINAL, SPAN_REASONING
from trainer.opd.draw import draw, signed, uniforms


@dataclass(frozen=True, kw_only=True, eq=False)
class Grammar:
    """An automaton over sampled tokens as tables; see datastore/harmony_grammar.py, whose they are by default.

    token_class_V, next_state_SC, span_S (of the token that led to a state), next_span_S (of the token after it): uint8.
    ended_S: bool. verdict_S: of a stream that stops in a state.
    """

    start: int
    token_class_V: np.ndarray
    next_state_SC: np.ndarray
    span_S: np.ndarray
    next_span_S: np.ndarray
    ended_S: np.ndarray
    verdict_S: Sequence[harmony_grammar.Verdict]


HARMONY = Grammar(
    start=harmony_grammar.START,
    token_class_V=harmony_grammar.token_class_V,
    next_state_SC=harmony_grammar.next_state_SC,
    span_S=harmony_grammar.span_S,
    next_span_S=harmony_grammar.next_span_S,
    ended_S=harmony_grammar.ended_S,
    verdict_S=harmony_grammar.verdict_S,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplePrompt:
    """A document to go on with. tokens_T: integers, at least one. key: uint64, of the rollout's random numbers."""

    tokens_T: np.ndarray
    key: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """What was sampled after a prompt. tokens_S int32; logprobs_S float32, natural log, of the distribution at
    temperature 1; spans_S uint8.
    """

    tokens_S: np.ndarray
    logprobs_S: np.ndarray
    spans_S: np.ndarray
    verdict: harmony_grammar.Verdict


class Slots:
    """token_B at position_B is the next to go through the model; active_B: a rollout is being sampled there.

    length_B: tokens sampled so far, limit_B: most that the document has room for. All int64 but active_B.
    """

    def __init__(
        self, grammar: Grammar, slots: int, longest: int, caps: dict[int, int], device: torch.device
    ) -> None:
        def table(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(device)

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._grammar, self._device = grammar, device
        self._class_V = torch.from_numpy(grammar.token_class_V.copy()).to(device)
        self._next_state_SC, self._span_S = table(grammar.next_state_SC), table(grammar.span_S)
        self._next_span_S, self._ended_S = table(grammar.next_span_S), table(grammar.ended_S) > 0
        self._row_B = torch.arange(slots, device=device)
        self._spans_3 = torch.arange(3, device=device)
        self._caps_3 = table(np.array([0, caps[SPAN_REASONING], caps[SPAN_FINAL]]))
        self.token_B, self.position_B, self.length_B = (zeros(slots) for _ in range(3))
        self._key_B, self._state_B, self._limit_B = (zeros(slots) for _ in range(3))
        self.active_B = zeros(slots, dtype=torch.bool)
        self._counts_B3 = zeros(slots, 3)
        # One column more, for what slots without a rollout would write.
        self._tokens_BL = zeros(slots, longest + 1, dtype=torch.int32)
        self._states_BL = zeros(slots, longest + 1, dtype=torch.int16)
        self._logprobs_BL = zeros(slots, longest + 1, dtype=torch.float32)
        self.taken = zeros()

    def clear(self) -> None:
        """As it was made: no rollout anywhere, nothing taken, also after a call that ended by an error.

        Slots without a rollout run along, and the experts multiply their rows together with the others': what they
        hold decides the last bits of the rollouts beside them, so nothing of an earlier call may stay.
        """
        for values in (self.token_B, self.position_B, self.length_B, self.active_B, self.taken):
            values.zero_()
        for values in (self._key_B, self._state_B, self._limit_B, self._counts_B3):
            values.zero_()

    def occupy(self, prompts: Sequence[tuple[int, SamplePrompt]], limits: Sequence[int]) -> None:
        """Start a rollout in each of the (free) slots; the prompts but their last tokens are in the cache."""
        index_N = torch.tensor([slot for slot, _ in prompts], device=self._device)
        starts: list[tuple[torch.Tensor, Callable[[SamplePrompt], int]]] = [
            (self.token_B, lambda prompt: int(prompt.tokens_T[-1])),
            (self.position_B, lambda prompt: len(prompt.tokens_T) - 1),
            (self._key_B, lambda prompt: signed(prompt.key)),
        ]
        for values_B, of in starts:
            new = torch.tensor([of(prompt) for _, prompt in prompts], dtype=torch.int64)
            values_B[index_N] = new.to(self._device)
        self._limit_B[index_N] = torch.tensor(list(limits), device=self._device)
        self._state_B[index_N] = self._grammar.start
        self.length_B[index_N] = 0
        self._counts_B3[index_N] = 0
        self.active_B[index_N] = True

    def advance(self, logits_BV: torch.Tensor) -> None:
        """Sample the token after position_B in every slot, record it where a rollout is, and see whether it ends."""
        token_B, logprob_B = draw(logits_BV, uniforms(self._key_B, self.position_B + 1))
        state_B = self._next_state_SC[self._state_B, self._class_V[token_B].long()]
        active_B = self.active_B
        column_B = torch.where(active_B, self.length_B, self._tokens_BL.shape[1] - 1)
        self._tokens_BL[self._row_B, column_B] = token_B.to(torch.int32)
        self._states_BL[self._row_B, column_B] = state_B.to(torch.int16)
        self._logprobs_BL[self._row_B, column_B] = logprob_B.to(torch.float32)
        own_B3 = self._span_S[state_B].unsqueeze(1) == self._spans_3
        self._counts_B3 += own_B3 & active_B.unsqueeze(1)
        self.length_B += active_B
        self.taken += active_B.sum()
        # A span at its cap is cut where its next token would come: one that closes on its last token goes on.
        span_B1 = self._next_span_S[state_B].unsqueeze(1)
        full_B = self._counts_B3.gather(1, span_B1).squeeze(1) >= self._caps_3[span_B1.squeeze(1)]
        over_B = self._ended_S[state_B] | full_B | (self.length_B >= self._limit_B)
        self.token_B.copy_(torch.where(active_B, token_B, self.token_B))
        self._state_B.copy_(torch.where(active_B, state_B, self._state_B))
        active_B &= ~over_B
        self.position_B += active_B

    def read(self, slots: Sequence[int]) -> list[Sample]:
        """What was sampled in these slots. Waits for the device."""
        index_N = torch.tensor(slots, dtype=torch.int64, device=self._device)
        columns = (self.length_B, self._tokens_BL, self._states_BL, self._logprobs_BL)
        of_slots = zip(*(t[index_N].cpu().numpy() for t in columns), strict=True)
        return [self._sample(*(t[:length] for t in recorded)) for length, *recorded in of_slots]

    def _sample(self, tokens_S: np.ndarray, states_S: np.ndarray, logp_S: np.ndarray) -> Sample:
        return Sample(
            tokens_S=tokens_S.copy(),
            logprobs_S=logp_S.copy(),
            spans_S=self._grammar.span_S[states_S].astype(np.uint8),
            verdict=self._grammar.verdict_S[states_S[-1]],
        )
