"""From a decoded request to what the teacher is shown: the prefix swap of each document, and its length. Pure."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from common.errors import FormatError
from datastore.harmony import Reasoning, RenderConfig
from datastore.prompt import Prefix, ScoreRequest
from datastore.scoring_protocol import ScoreBatch, ScoreDocument
from datastore.teacher import SystemText, TeacherConfig


def score_requests(batch: ScoreBatch, teacher: TeacherConfig) -> list[ScoreRequest]:
    """The requests of a batch, in its order.

    With the batch's render config stated, the teacher reads its own system text (`teacher.system`) and the document's
    reasoning effort, if any, in place of the stored prefix. Raises FormatError when a document needs that config and
    the batch has none, or scores a position inside the prefix; AlignmentError when a document does not open with it.
    """
    return [
        _score_request(document, batch.render, teacher.system, number)
        for number, document in enumerate(batch.documents)
    ]


def _score_request(
    document: ScoreDocument, render: RenderConfig | None, system: SystemText | None, number: int
) -> ScoreRequest:
    if render is None and (system is not None or document.reasoning is not None):
        raise FormatError(
            f"document {number} is to be read with another system text than its own",
            got="no render config in the request",
            expected="the render config that wrote the constant prefix of its documents",
        )
    prefix = Prefix.none() if render is None else _prefix(render, system, document.reasoning)
    unscored = prefix.request(document.tokens_T, np.zeros(len(document.tokens_T), np.uint8))
    request = replace(unscored, positions_P=document.positions())
    first_free = len(prefix.stored_T) - 1
    if len(request.positions_P) and request.positions_P[0] < first_free:
        raise FormatError(
            f"document {number}: a position inside the constant prefix",
            got=int(request.positions_P[0]),
            expected=f"at least {first_free}",
        )
    return request


@functools.lru_cache(maxsize=64)
def _prefix(stored: RenderConfig, system: SystemText | None, reasoning: Reasoning | None) -> Prefix:
    shown = stored if system is None else system.applied_to(stored)
    if reasoning is not None:
        shown = SystemText(reasoning=reasoning).applied_to(shown)
    return Prefix.swapped(stored, shown)
