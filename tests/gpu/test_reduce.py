"""The reduction on CUDA at the teacher's shape: bf16 hidden states and lm_head, fp32 logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datastore.packed import unpack
from datastore.reduce import VocabShard, reduce_hidden
from datastore.target import reduce_logprobs, require_valid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, HIDDEN, VOCAB, THRESHOLD = 40, 2880, 201_088, 1 / 50


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_equals_the_reference(scale: float) -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, device="cuda").bfloat16()
    head = torch.randn(VOCAB, HIDDEN, generator=generator, device="cuda")
    head = (head * scale * 3 / HIDDEN**0.5).bfloat16()
    realised = torch.randint(0, VOCAB, (ROWS,), generator=generator, device="cuda")
    uniforms = torch.rand(ROWS, generator=generator, device="cuda").double()
    packed = reduce_hidden(
        *(hidden, head, realised, uniforms), threshold=THRESHOLD, chunk=16, shard=VocabShard()
    )
    target = unpack(packed.cpu().numpy(), np.arange(ROWS), THRESHOLD)
    logprobs = (hidden.double() @ head.double().T).log_softmax(-1).cpu().numpy()
    expected = reduce_logprobs(
        logprobs, realised.cpu().numpy(), np.arange(ROWS), uniforms.cpu().numpy(), THRESHOLD
    )
    require_valid(target)
    # Logits reach 50 at the largest scale, where fp32 sums of 2880 products are off by 2e-4.
    np.testing.assert_allclose(
        target.realised_logprob_P, expected.realised_logprob_P, rtol=1e-5, atol=1e-4
    )
    np.testing.assert_array_equal(target.num_head_P, expected.num_head_P)
    np.testing.assert_array_equal(target.offsets_P1, expected.offsets_P1)
    np.testing.assert_allclose(target.weights_E, expected.weights_E, rtol=1e-3)
    np.testing.assert_allclose(target.entropy_P, expected.entropy_P, atol=1e-3)
    # A point within rounding of a boundary falls on a neighbour of the exact id.
    assert (target.ids_E != expected.ids_E).mean() < 0.1
