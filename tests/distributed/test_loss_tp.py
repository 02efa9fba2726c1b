"""The loss over several processes: a sharded vocabulary and a split batch equal one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.gloo import run_gloo
from tests.trainer.packed import random_row
from trainer.batch import make_batch
from trainer.losses.chunk import WHOLE_VOCAB, HeadTargets, TokenTargets, VocabShard
from trainer.losses.coefficients import Coefficients, SampledTokens
from trainer.losses.fused_linear import fused_linear_eval, fused_linear_loss
from trainer.losses.objective import batch_loss
from trainer.losses.spans import LossConfig, span_counts

VOCAB, HIDDEN, TOKENS, ENTRIES = 96, 6, 40, 9


def _of_every_kind(random_4N: torch.Tensor) -> Coefficients:
    """CE with KD, the policy gradient and the KL on a third of the positions each."""
    kind = torch.arange(random_4N.shape[1]) % 3
    text, policy = random_4N * (kind == 0), random_4N[0] * (kind == 1)
    return Coefficients(
        ce_N=text[0],
        kd_N=text[1],
        kl_N=random_4N[0] * (kind == 2),
        sampled=SampledTokens(
            sampled_N=kind == 1,
            coef_N=policy,
            teacher_logprob_N=-5 * random_4N[2],
            sampling_logprob_N=-5 * random_4N[3],
            ratio_low=0.5,
            ratio_high=2.0,
            advantage_clip=3.0,
        ),
    )


def _losses(start: int, stop: int, shard: VocabShard, scale: float) -> dict[str, torch.Tensor]:
    """Everything that the fused function gives, with the ids start .. stop on this rank."""
    generator = torch.Generator().manual_seed(5)
    hidden = scale * torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    order = [torch.randperm(VOCAB, generator=generator)[:ENTRIES] for _ in range(30)]
    targets = TokenTargets(
        index_N=torch.arange(5, 35),
        labels_N=torch.randint(0, VOCAB, (30,), generator=generator),
        ids_NK=torch.stack(order).int(),
        weights_NK=torch.rand(30, ENTRIES, generator=generator),
        heads=HeadTargets(torch.arange(30) % 5, -3 * torch.rand(30, generator=generator)),
    )
    coefficients = _of_every_kind(torch.rand(4, 30, generator=generator))
    hidden.requires_grad_()
    weight = weight[start:stop].clone().requires_grad_()
    loss, losses = fused_linear_loss(
        hidden, weight, targets, coefficients, shard=shard, chunk_tokens=7
    )
    loss.backward()
    evaluated, top = fused_linear_eval(hidden, weight, targets, shard=shard, chunk_tokens=11)
    torch.testing.assert_close(evaluated, losses)
    return {
        "loss": loss.detach(),
        "ce": losses.ce_N,
        "kd": losses.kd_N,
        "kl": losses.kl_N,
        "top": top,
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
    }


def _sharded(rank: int, cuts: list[int], scale: float) -> dict[str, torch.Tensor]:
    shard = VocabShard(start=cuts[rank], group=dist.group.WORLD)
    return _losses(cuts[rank], cuts[rank + 1], shard, scale)


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("cuts", [[0, 48, 96], [0, 95, 96]])
def test_a_sharded_vocabulary_equals_a_whole_one(cuts: list[int], scale: float) -> None:
    """At scale 200 a rank's largest logit lies hundreds of nats below the other's."""
    whole = _losses(0, VOCAB, WHOLE_VOCAB, scale)
    ranks = run_gloo(_sharded, 2, cuts, scale)
    assert whole["kl"].count_nonzero() == 24
    for rank in ranks:
        for name in ("loss", "ce", "kd", "kl", "top", "grad_hidden"):
            torch.testing.assert_close(rank[name], whole[name], rtol=1e-11, atol=1e-11)
    gathered = torch.cat([rank["grad_weight"] for rank in ranks])
    torch.testing.assert_close(gathered, whole["grad_weight"], rtol=1e-11, atol=1e-11)


def _data_parallel(rank: int, world_size: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Each rank takes its slice of the rows; counts before, losses and gradients after, are summed."""
    rng = np.random.default_rng(4)
    packed = [random_row(rng, [(2, 1 + b, 9 - b), (1, b, 3)], 32, VOCAB) for b in range(rows)]
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(rows, 32, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    mine = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
    documents = [None if b == 0 else of_row for b, (_, of_row) in enumerate(packed)]
    batch = make_batch([row for row, _ in packed[mine]], documents[mine])
    counts = span_counts(batch)
    if world_size > 1:
        dist.all_reduce(counts)
    config = LossConfig(kd_weight=0.5, chunk_tokens=16)
    loss, sums = batch_loss(hidden[mine], weight, batch, counts, config)
    loss.backward()
    results = loss.detach(), sums, weight.grad
    if world_size > 1:
        for result in results:
            dist.all_reduce(result)
    return results


def test_data_parallel_ranks_sum_to_the_global_batch() -> None:
    whole = _data_parallel(0, 1, 6)
    for rank in run_gloo(_data_parallel, 2, 2, 6):
        for part, total in zip(rank, whole, strict=True):
            torch.testing.assert_close(part, total, rtol=1e-7, atol=1e-9)


def _fails_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one has a reason")
    dist.barrier()


def test_a_failing_rank_is_reported_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="rank one has a reason"):
        run_gloo(_fails_on_rank_one, 2)
