"""The made-up teacher of the OPD tests gives what the reference reduction makes of its whole distribution."""

from __future__ import annotations

import numpy as np

from common.tokenizer import CHANNEL, END, RETURN, VOCAB_SIZE, encoding
from datastore.prompt import Prefix
from datastore.target import position_uniforms, reduce_logprobs
from tests.datastore.line_engine import THRESHOLD
from tests.trainer.opd.bigram_engine import BigramTeacher, phases
from tests.trainer.opd.served import handmade_documents


def test_targets_are_those_of_the_reference() -> None:
    documents = handmade_documents(16)
    teacher = BigramTeacher((d.tokens_T, d.spans_T) for d in documents[:12])
    tokens_T, spans_T = documents[15].tokens_T.copy(), documents[15].spans_T
    tokens_T[-8:-4] = [0, 77_777, VOCAB_SIZE - 1, 77_777]  # of no document
    request = Prefix.none().request(tokens_T, spans_T)
    found, positions_P = teacher.target(request), request.positions_P
    logprobs_PV = np.stack(
        [teacher.logprobs(phases(tokens_T)[p], tokens_T[p]) for p in positions_P]
    )
    uniforms_P = position_uniforms(request.content_key, positions_P)
    realised_P = tokens_T[positions_P + 1]
    expected = reduce_logprobs(logprobs_PV, realised_P, positions_P, uniforms_P, THRESHOLD)
    for name in ("positions_P", "num_head_P", "offsets_P1", "ids_E"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("weights_E", "realised_logprob_P", "log_tail_mass_P", "entropy_P"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=2e-6)


def test_it_likes_the_marks_in_their_order() -> None:
    documents = handmade_documents(12)
    teacher = BigramTeacher((d.tokens_T, d.spans_T) for d in documents)
    (analysis,), (final,) = encoding().encode("analysis"), encoding().encode("final")
    after_channel = [np.exp(teacher.logprobs(phase, CHANNEL)) for phase in (1, 2)]
    assert after_channel[0][analysis] > 0.9 > 1e-6 > after_channel[0][final]
    assert after_channel[1][final] > 0.9 > 1e-6 > after_channel[1][analysis]
    dot = int(documents[0].tokens_T[np.flatnonzero(documents[0].tokens_T == END)[-1] - 1])
    assert (
        np.exp(teacher.logprobs(1, dot)[END])
        > 0.5
        > 1e-6
        > np.exp(teacher.logprobs(1, dot)[RETURN])
    )
