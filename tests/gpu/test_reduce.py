"""The reduction on CUDA at the teacher's shape: bf16 hidden states and lm_head, fp32 logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

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


def _shard(rank: int, ranks: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    hidden, head, realised, uniforms = _problem(rank)
    mine = VOCAB // ranks
    packed = reduce_hidden(
        *(hidden, head[rank * mine : (rank + 1) * mine].contiguous(), realised, uniforms),
        threshold=THRESHOLD,
        chunk=16,
        shard=VocabShard(first_id=rank * mine, group=dist.group.WORLD),
    )
    np.save(f"{folder}/{rank}.npy", packed.cpu().numpy())
    dist.destroy_process_group()


def _problem(device: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator) * 3 / HIDDEN**0.5
    realised = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    uniforms = torch.rand(ROWS, generator=generator).double()
    values = (hidden.bfloat16(), head.bfloat16(), realised, uniforms)
    return tuple(value.to(f"cuda:{device}") for value in values)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_shard, (2, str(tmp_path)), nprocs=2)
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in range(2))
    np.testing.assert_array_equal(first, second)
    packed = reduce_hidden(*_problem(0), threshold=THRESHOLD, chunk=16, shard=VocabShard())
    alone = unpack(packed.cpu().numpy(), np.arange(ROWS), THRESHOLD)
    together = unpack(first, np.arange(ROWS), THRESHOLD)
    np.testing.assert_array_equal(together.num_head_P, alone.num_head_P)
    np.testing.assert_array_equal(together.offsets_P1, alone.offsets_P1)
    np.testing.assert_allclose(together.realised_logprob_P, alone.realised_logprob_P, atol=1e-4)
    np.testing.assert_allclose(together.weights_E, alone.weights_E, rtol=1e-3)
    assert (together.ids_E != alone.ids_E).mean() < 0.05
