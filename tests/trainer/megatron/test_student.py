"""The student in a process of its own: its parts against independent references, and the invariances of a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import (
    SEQ_LEN,
    STUDENT,
    in_vocabulary,
    main_gradients,
    micro_batches,
    step,
    tiny_config,
    tiny_rows,
)
from tests.trainer.packed import pack, random_document
from trainer.batch import make_batch
from trainer.parameters import component_of, parameter_counts
from trainer.student_config import StudentConfig


def _in_student(_rank: int) -> dict:
    from trainer.megatron.topology import distributed

    config = tiny_config()
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        def fresh(**changes) -> Trainer:
            torch.manual_seed(1)
            return Trainer(tiny_config(**changes), topology, SEQ_LEN)

        return {
            "shapes": {n: tuple(p.shape) for n, p in fresh().student.named_parameters()},
            "alone": _documents_alone(fresh()),
            "experts": _experts(fresh()),
            "shared": _shared_bias(fresh()),
            "routing": _padding_in_the_router(fresh()),
            "splits": [_step_of(fresh(), size) for size in (1, 2, 4, 8)],
            "recompute": _step_of(fresh(recompute=True), 4),
            "losses": _ten_steps(fresh()),
            "bf16": _ten_steps(fresh(precision="bf16")),
        }


def _documents_alone(trainer) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    documents = [
        random_document(rng, *shape, vocab=300) for shape in [(3, 5, 4), (2, 8, 3), (1, 4, 6)]
    ]
    trainer.model.eval()
    with torch.no_grad():
        packed = _hidden(trainer, documents)
        alone = [_hidden(trainer, [d])[: len(d[0])] for d in documents]
    return packed[: sum(len(d[0]) for d in documents)].numpy(), torch.cat(alone).numpy()


def _hidden(trainer, documents) -> torch.Tensor:
    return trainer._hidden(trainer.model, in_vocabulary(make_batch([pack(documents, SEQ_LEN)])))[0]


def _experts(trainer) -> dict:
    experts = trainer.student.decoder.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(2)
    owner = torch.tensor([2, 0, 6, 7, 0, 6, 3, 6, 0, 2, 6])
    x = torch.randn(11, 32, generator=generator, requires_grad=True)
    gate = torch.rand(11, generator=generator, requires_grad=True)
    weigh = torch.randn(11, 32, generator=generator)
    torch.nn.init.normal_(experts.fc1_bias, generator=generator)
    torch.nn.init.normal_(experts.fc2_bias, generator=generator)
    inputs = [x, gate, *experts.parameters()]
    y = experts(x, gate.unsqueeze(1), experts.sort(owner.unsqueeze(1)))
    grads = torch.autograd.grad((y * weigh).sum(), inputs)
    token_by_token = torch.stack(
        [_one_token(x[n], gate[n], experts, int(owner[n])) for n in range(11)]
    )
    expected = torch.autograd.grad((token_by_token * weigh).sum(), inputs)
    names = ["y", "x", "gate", *(name for name, _ in experts.named_parameters())]
    pairs = zip(names, [y, *grads], [token_by_token, *expected], strict=True)
    return {name: (got.detach().numpy(), want.detach().numpy()) for name, got, want in pairs}


def _one_token(x, gate, experts, e):
    inner = torch.clamp(experts.fc1_weight[e] @ x + experts.fc1_bias[e], min=0) ** 2
    return gate * (experts.fc2_weight[e] @ inner + experts.fc2_bias[e])


def _shared_bias(trainer) -> float:
    """How much of a unit of the shared expert's last bias reaches the layer's output."""
    layer = trainer.student.decoder.layers[1].mlp
    x = torch.randn(SEQ_LEN, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, _ = layer(x)
        layer.shared_experts.linear_fc2.bias += 1.0
        after, _ = layer(x)
    return float((after - before - 1.0).abs().max())


def _padding_in_the_router(trainer) -> dict:
    """Balance loss and counts of two rows with unlike padding, from the router and by the formula row by row."""
    router = trainer.student.decoder.layers[1].mlp.router.train()
    logits = torch.randn(SEQ_LEN, 2, 8, generator=torch.Generator().manual_seed(4))
    padding = torch.zeros(SEQ_LEN, 2, dtype=torch.bool)
    padding[40:, 0] = padding[25:, 1] = True
    router.local_tokens_per_expert.zero_()
    _, chosen = router.routing(logits, padding)
    aux = float(router.take_aux_loss())
    by_hand = 0.0
    for b, length in enumerate([40, 25]):
        scores = torch.sigmoid(logits[:length, b])
        counts = torch.bincount(scores.topk(2).indices.flatten(), minlength=8)
        share = (scores / scores.sum(-1, keepdim=True)).sum(0)
        by_hand += 1e-2 * float((counts * share).sum()) * 8 / (2 * length**2)
    counted = torch.bincount(chosen.view(SEQ_LEN, 2, 2)[~padding].flatten(), minlength=8)
    return {
        "aux": (aux, by_hand),
        "counts": (router.local_tokens_per_expert.tolist(), counted.tolist()),
    }


def _step_of(trainer, size: int) -> tuple[dict, dict]:
    report = step(trainer, micro_batches(tiny_rows(8), size), 0.0)
    return report.values, main_gradients(trainer)


def _ten_steps(trainer) -> list[float]:
    batches = micro_batches(tiny_rows(8), 4)
    return [step(trainer, batches, 1e-2).values["loss/total"] for _ in range(10)]


@pytest.fixture(scope="module")
def seen() -> dict:
    return run_gloo(_in_student, 1)[0]


def test_every_parameter_is_in_the_count_by_component(seen) -> None:
    student = StudentConfig.model_validate(STUDENT)
    counts = parameter_counts(student)
    built: dict[str, int] = {}
    for name, shape in seen["shapes"].items():
        component = component_of(name, student)
        built[component] = built.get(component, 0) + int(np.prod(shape))
    assert built == {name: counts[name] for name in built}
    assert counts["total"] == sum(built.values())


def test_packed_documents_equal_the_same_documents_alone(seen) -> None:
    packed, alone = seen["alone"]
    np.testing.assert_allclose(packed, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["y", "x", "gate", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]
)
def test_experts_equal_one_token_at_a_time(seen, name) -> None:
    got, expected = seen["experts"][name]
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_the_shared_expert_adds_its_bias(seen) -> None:
    assert seen["shared"] < 1e-5


def test_padding_counts_in_no_routing_statistic(seen) -> None:
    aux, by_hand = seen["routing"]["aux"]
    assert aux == pytest.approx(by_hand, rel=1e-5)
    got, expected = seen["routing"]["counts"]
    assert got == expected


@pytest.mark.parametrize("other", [0, 1, 2])
def test_loss_and_gradients_do_not_depend_on_the_micro_batch_size(seen, other) -> None:
    (values, gradients), (whole_values, whole) = seen["splits"][other], seen["splits"][3]
    for name in (
        "loss/total",
        "loss/ce/reasoning",
        "loss/kd/final",
        "grad_norm",
        "router/aux_loss",
    ):
        assert values[name] == pytest.approx(whole_values[name], rel=1e-6), name
    flat, flat_whole = (np.concatenate([g[n].ravel() for n in whole]) for g in (gradients, whole))
    assert np.linalg.norm(flat - flat_whole) < 1e-6 * np.linalg.norm(flat_whole)
    assert all(np.abs(gradient).max() > 0 for gradient in whole.values())


def test_recomputation_changes_neither_loss_nor_gradients(seen) -> None:
    (values, gradients), (plain_values, plain) = seen["recompute"], seen["splits"][2]
    assert values == pytest.approx(plain_values, rel=1e-6)
    flat, flat_plain = (np.concatenate([g[n].ravel() for n in plain]) for g in (gradients, plain))
    assert np.linalg.norm(flat - flat_plain) < 1e-6 * np.linalg.norm(flat_plain)


@pytest.mark.parametrize("precision", ["losses", "bf16"])
def test_ten_steps_lower_the_loss(seen, precision) -> None:
    losses = seen[precision]
    assert losses[-1] < 0.7 * losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[:5]))
