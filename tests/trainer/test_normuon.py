"""NorMuon against its formulas, one matrix at a time in float64, where the polar factor is taken by an SVD."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from tests.distributed.gloo import run_gloo
from trainer.normuon import NorMuon, polar_express

SETTINGS = {"lr": 0.02, "momentum": 0.9, "beta2": 0.8, "eps": 1e-10, "weight_decay": 0.1}
SHAPES = [(6, 20), (20, 6), (7, 7), (1, 12), (12, 1), (6, 20), (5, 6, 20), (3, 20, 6), (6, 20)]
# docs/architecture.md, Polar Express
COEFFICIENTS = """
8.156554524902461 -22.48329292557795 15.878769915207462
4.042929935166739 -2.808917465908714 0.5000178451051316
3.8916678022926607 -2.772484153217685 0.5060648178503393
3.285753657755655 -2.3681294933425376 0.46449024233003106
2.3465413258596377 -1.7097828382687081 0.42323551169305323
"""


def _reference_polar(U: np.ndarray) -> np.ndarray:
    left, values, right = np.linalg.svd(U, full_matrices=False)
    values = values / (np.sqrt((values**2).sum()) * 1.02 + 1e-6)
    for line in COEFFICIENTS.split("\n")[1:-1]:
        a, b, c = map(float, line.split())
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def _reference(W: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """The weight after one step a gradient, each matrix [m, n] on its own."""
    if W.ndim == 3:
        return np.stack([_reference(W[e], [G[e] for G in grads]) for e in range(len(W))])
    mu, beta2, lr = (SETTINGS[name] for name in ("momentum", "beta2", "lr"))
    M, v = np.zeros_like(W), np.zeros(len(W))
    for G in grads:
        M = mu * M + (1 - mu) * G
        X = _reference_polar(mu * M + (1 - mu) * G)
        v = beta2 * v + (1 - beta2) * (X**2).mean(axis=1)
        Y = X / np.sqrt(v + SETTINGS["eps"])[:, None]
        Y *= np.sqrt((X**2).sum()) / np.sqrt((Y**2).sum())
        step = lr * math.sqrt(max(1.0, W.shape[0] / W.shape[1]))
        W = (1 - lr * SETTINGS["weight_decay"]) * W - step * Y
    return W


def _made(dtype: torch.dtype, steps: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(4)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]

    return draw(), [draw() for _ in range(steps)]


def _train(
    dtype: torch.dtype = torch.float32, steps: int = 4, **keywords: object
) -> tuple[list[torch.Tensor], NorMuon]:
    weights, grads = _made(dtype, steps)
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = NorMuon(parameters, polar_dtype=dtype, **(SETTINGS | keywords))
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad
        optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["fp64", "fp32"]
)
def test_batches_equal_the_formula_matrix_by_matrix(dtype, bound) -> None:
    weights, grads = _made(torch.float64, 4)
    got, _ = _train(dtype)
    for number, weight in enumerate(weights):
        expected = _reference(weight.numpy(), [step[number].numpy() for step in grads])
        error = np.linalg.norm(got[number].double().numpy() - expected)
        assert error < bound * np.linalg.norm(expected), SHAPES[number]


def _unequal_chunks(_rank: int, chunk_sizes: tuple[int, ...]) -> list[int]:
    """The chunk sizes at which any parameter of SHAPES differs in any bit from one that is trained alone."""
    alone = []
    weights, grads = _made(torch.float32, 4)
    for number, weight in enumerate(weights):
        parameter = torch.nn.Parameter(weight)
        optimizer = NorMuon([parameter], polar_dtype=torch.float32, chunk_weights=1, **SETTINGS)
        for step in grads:
            parameter.grad = step[number]
            optimizer.step()
        alone.append(parameter.detach())
    batched = {size: _train(chunk_weights=size)[0] for size in chunk_sizes}
    return [
        size
        for size, got in batched.items()
        if not all(torch.equal(one, other) for one, other in zip(alone, got, strict=True))
    ]


def _halves_are_the_whole(_rank: int) -> bool:
    generator = torch.Generator().manual_seed(2)
    weight, *grads = torch.randn(4, 6, 8, 24, generator=generator)
    ends = []
    for part in (slice(0, 6), slice(0, 3), slice(3, 6)):
        parameter = torch.nn.Parameter(weight[part].clone())
        optimizer = NorMuon([parameter], polar_dtype=torch.float32, **SETTINGS)
        for grad in grads:
            parameter.grad = grad[part].clone()
            optimizer.step()
        ends.append(parameter.detach())
    return torch.equal(ends[0], torch.cat(ends[1:]))


# A process with one thread of its own: several cut batched products by their number of matrices, and after vLLM has
# run in a process (as in other tests) its products of one matrix and of several differ in the last bits.


def test_stacking_and_chunks_change_no_bit() -> None:
    """With 240 a chunk holds two matrices of (6, 20), and cuts the stack of five."""
    assert run_gloo(_unequal_chunks, 1, (1, 240, 1000, 1 << 25)) == [[]]


def test_a_part_of_a_stack_moves_as_within_it() -> None:
    """What expert parallelism does: two ranks with a half of the experts each."""
    assert run_gloo(_halves_are_the_whole, 1) == [True]


def test_singular_values_land_near_one() -> None:
    """2 x 2 matrices of norm 1000 with one value of every size; 1.02 is the safety on the norm."""
    values_B = torch.logspace(math.log10(1.02e-3), 0, 20_001, dtype=torch.float64)
    other_B = (1 - values_B.square()).clamp_min(0).sqrt()
    U_B22 = 1000 * torch.diag_embed(torch.stack([values_B, other_B], dim=1))
    X_B22 = polar_express(U_B22, torch.float64)
    assert X_B22[:, 0, 0].min() > 0.8585 and X_B22[:, 0, 0].max() < 1.1415
    small = torch.diag_embed(torch.tensor([[1e-9, 1.0]], dtype=torch.float64))
    slope = polar_express(1000 * small, torch.float64)[0, 0, 0] / (1e-9 / 1.02)
    assert slope == pytest.approx(989, abs=1)


@pytest.mark.parametrize("shape", [(3, 32, 96), (3, 96, 32), (1, 64, 64)])
def test_bf16_products_give_the_same_range(shape) -> None:
    """Rounded products turn X by 5 to 8 % in norm, and its singular values stay where they should."""
    U_Bmn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = (polar_express(U_Bmn, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() < 0.1 * exact.norm()
    values = torch.linalg.svdvals(rounded.double())
    assert values.min() > 0.845 and values.max() < 1.155


def test_without_a_gradient_a_matrix_only_decays() -> None:
    weight = torch.ones(2, 4, 6)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = NorMuon([parameter], polar_dtype=torch.float32, **SETTINGS)
    parameter.grad = torch.zeros(2, 4, 6)
    parameter.grad[1, 0, 0] = 1.0
    optimizer.step()
    decay = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
    assert torch.equal(parameter.detach()[0], weight[0] * decay)
    moved = parameter.detach()[1] != weight[1] * decay
    assert moved.nonzero().tolist() == [[0, 0]]


def test_the_state_is_a_momentum_and_one_number_a_row() -> None:
    _, optimizer = _train()
    for shape, state in zip(SHAPES, optimizer.state.values(), strict=True):
        assert {name: tuple(of.shape) for name, of in state.items()} == {
            "momentum": shape,
            "row_second_moment": shape[:-1],
        }


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[5\]"):
        NorMuon([torch.nn.Parameter(torch.zeros(5))], 0.1, polar_dtype=torch.float32)


def test_a_scale_on_gradients_is_that_of_the_gradients() -> None:
    """A number or a tensor; the gradients stay as they are. A quarter is exact."""
    weights, (grads, *_) = _made(torch.float32, 1)
    ends = []
    for factor, scale in ((0.25, None), (1.0, 0.25), (1.0, torch.tensor(0.25))):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        optimizer = NorMuon(parameters, polar_dtype=torch.float32, **SETTINGS)
        optimizer.grad_scale = scale
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * factor
        optimizer.step()
        for parameter, grad in zip(parameters, grads, strict=True):
            assert torch.equal(parameter.grad, grad * factor)
        ends.append([parameter.detach() for parameter in parameters])
    for end in ends[1:]:
        assert all(torch.equal(one, other) for one, other in zip(ends[0], end, strict=True))


def test_copies_take_the_new_weights() -> None:
    weights, (grads, *_) = _made(torch.float32, 1)
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = NorMuon(parameters, polar_dtype=torch.float32, chunk_weights=240, **SETTINGS)
    optimizer.copies = {of: torch.zeros_like(of, dtype=torch.bfloat16) for of in parameters[:-1]}
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    for parameter, taken in optimizer.copies.items():
        assert torch.equal(taken, parameter.detach().bfloat16())


def test_tensors_that_are_replaced_between_steps_are_followed() -> None:
    """Gradients of their own each step, in place or not; states by load_state_dict; copies that come later."""
    weights, grads = _made(torch.float32, 3)
    ends = []
    for way in ("in place", "replaced"):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        optimizer = NorMuon(parameters, polar_dtype=torch.float32, **SETTINGS)
        for number, of_step in enumerate(grads):
            for parameter, grad in zip(parameters, of_step, strict=True):
                if way == "in place" and number:
                    parameter.grad.copy_(grad)
                else:
                    parameter.grad = grad.clone()
            if way == "replaced":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.copies = {
                    p: torch.zeros_like(p, dtype=torch.bfloat16) for p in parameters
                }
            optimizer.step()
        ends.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert all(torch.equal(c, p.detach().bfloat16()) for p, c in optimizer.copies.items())
