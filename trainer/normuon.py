"""NorMuon (arXiv 2510.05491) with Polar Express (arXiv 2505.16932), same-shape matrices as one batched product.

For a matrix W [m, n] with gradient G, momentum M and a mean square v of every row [m]:

    M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G                              Nesterov
    X = polar(U)                                                                orthogonal factor, five products
    v <- beta2 v + (1 - beta2) mean over columns of X^2;  Y = X / sqrt(v + eps)  by rows, no bias correction
    W <- (1 - lr wd) W - lr sqrt(max(1, m / n)) Y ||X||_F / ||Y||_F

The paper has M in place of U and lr 0.2 sqrt(m n) / ||Y||_F, an RMS of 0.2 lr in every matrix; here it is lr / sqrt(n),
or a little less where U lacks rank.

Cost. The optimizer's floor is 22 bytes a weight (gradient 4, momentum 8, weight in fp32 8, its bf16 copy 2): 118 GB for
the 5.3 G expert weights. Polar Express adds 5 (4 k^2 l + 2 k^3) FLOP a matrix, k = min(m, n), l = max(m, n):
357 MFLOP for a 128 x 1024 expert, 14.4 TFLOP for all 40,448 of them; each of its steps moves three bf16 copies of X.

On CUDA, matrices with a short side of 128 (`on_gram`) take the same steps on A = U U^T alone, which moves 28 bytes a
weight in all (trainer/kernels/normuon.py); all others, and everything on a CPU, take the steps as written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Five steps for singular values from 1e-3, of the public NanoGPT speed runs (safety 2e-2, cushion 2); the paper's own
# listing differs. On [1e-3, 1/1.02] their composition lies in [0.859, 1.141]; its slope at 0 is 989.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY, TINY = (
    2e-2,
    1e-6,
)  # the norm is taken 2 % too large, so that rounding leaves no value above 1
# Temporaries of a chunk: U and its scaled copy in fp32, X twice, the two k x k products, at most 20 bytes a weight
# (fp32, square matrices). 2^25 weights are one expert tensor [256, 128, 1024]: 12 bytes a weight there with bf16.
CHUNK_WEIGHTS = 1 << 25


def polar_express(U_Bmn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The orthogonal factors of B matrices, singular values near 1, in `dtype`, in which the products run too.

    X = U / (1.02 ||U||_F + 1e-6), then five times X <- (a I + b A + c A^2) X with A = X X^T; the same from the right
    with A = X^T X when m > n. A zero matrix stays zero.
    """
    norm_B11 = torch.linalg.vector_norm(U_Bmn, dim=(-2, -1), keepdim=True)
    # Two kernels: one that multiplies with a broadcast and converts took 89 ms of a full step's 347 (H200).
    X_Bmn = (U_Bmn * (norm_B11 * (1 + SAFETY) + TINY).reciprocal()).to(dtype)
    wide = U_Bmn.shape[-2] <= U_Bmn.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        A_Bkk = X_Bmn @ X_Bmn.mT if wide else X_Bmn.mT @ X_Bmn
        # a on the diagonal, not a X beside the product: that would read X once more and copy it.
        A_Bkk = torch.baddbmm(A_Bkk, A_Bkk, A_Bkk, beta=b, alpha=c)
        A_Bkk.diagonal(dim1=-2, dim2=-1).add_(a)
        X_Bmn = A_Bkk @ X_Bmn if wide else X_Bmn @ A_Bkk
    return X_Bmn


@dataclass(frozen=True)
class Piece:
    """Some matrices of one parameter: views of its weight, gradient and momentum [b, m, n], of its row mean
    squares [b, m] and, if it has one, of the weight's copy in another dtype [b, m, n].
    """

    weight: torch.Tensor
    grad: torch.Tensor
    momentum: torch.Tensor
    rows: torch.Tensor
    copy: torch.Tensor | None = None


Batch = tuple[list[Piece], bool]  # matrices of one shape, and whether the Triton kernels take them


def on_gram(piece: Piece, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take matrices of this kind: on CUDA, fp32 with bf16 products, 128 on the short side
    and a multiple of 128 on the long one (all experts of the full student), contiguous.
    """
    short, long = sorted(piece.weight.shape[1:])
    tensors = [piece.weight, piece.grad, piece.momentum, piece.rows]
    return (
        piece.weight.is_cuda
        and dtype == torch.bfloat16
        and (short, long % 128) == (128, 0)
        and all(of.dtype == torch.float32 and of.is_contiguous() for of in tensors)
        and (piece.copy is None or (piece.copy.dtype == dtype and piece.copy.is_contiguous()))
    )


def update_pieces(
    pieces: list[Piece],
    *,
    lr: float,
    momentum: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    dtype: torch.dtype,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """One step on matrices of one shape, as one batch. Changes weights, their copies, momenta and row mean squares in
    place. grad_scale: [] on the device, times which gradients are taken.
    """
    m, n = pieces[0].weight.shape[1:]
    sizes = [len(piece.weight) for piece in pieces]
    # Lists, so that each line is a few launches for all matrices: one by one, the 699 dense ones of the full student
    # took the host 195 ms a step (H200).
    momenta = [piece.momentum for piece in pieces]
    U_Bmn = pieces[0].grad.new_empty(sum(sizes), m, n)
    parts = list(U_Bmn.split(sizes))
    torch._foreach_copy_(parts, [piece.grad for piece in pieces])
    if grad_scale is not None:
        torch._foreach_mul_(parts, grad_scale)
    torch._foreach_lerp_(momenta, parts, 1 - momentum)
    torch._foreach_lerp_(parts, momenta, momentum)
    X_Bmn = polar_express(U_Bmn, dtype)
    rows = [piece.rows for piece in pieces]
    rows_Bm = torch.cat(rows)
    square_Bm = torch.linalg.vector_norm(X_Bmn, dim=-1, dtype=rows_Bm.dtype).square_()
    factor_Bm = row_factors(rows_Bm, square_Bm, n, beta2, eps).mul_(lr * math.sqrt(max(1.0, m / n)))
    torch._foreach_copy_(rows, list(rows_Bm.split(sizes)))
    torch.mul(X_Bmn, factor_Bm.unsqueeze(-1), out=U_Bmn)
    weights = [piece.weight for piece in pieces]
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_sub_(weights, parts)
    copies = [piece.copy for piece in pieces if piece.copy is not None]
    if copies:
        torch._foreach_copy_(copies, [p.weight for p in pieces if p.copy is not None])


def row_factors(
    rows_Bm: torch.Tensor, square_Bm: torch.Tensor, columns: int, beta2: float, eps: float
) -> torch.Tensor:
    """Factors [B, m] on the rows of X: the inverse root of their mean square, the whole matrix keeping its norm.

    square_Bm: sum of squares of every row. rows_Bm takes them in, in place.
    """
    rows_Bm.lerp_(square_Bm / columns, 1 - beta2)
    factor_Bm = (rows_Bm + eps).rsqrt_()
    before_B1 = square_Bm.sum(dim=-1, keepdim=True).sqrt_()
    after_B1 = (square_Bm * factor_Bm.square()).sum(dim=-1, keepdim=True).sqrt_()
    return factor_Bm.mul_(before_B1 / after_B1.clamp_min_(1e-10))


class NorMuon(torch.optim.Optimizer):
    """NorMuon on parameters [m, n] or stacks of matrices [E, m, n].

    State of a parameter: `momentum` of its shape and `row_second_moment` [m] or [E, m], both in its dtype.
    polar_dtype: of the products of Polar Express, bf16 on CUDA and fp32 on CPU. chunk_weights: matrices of one shape
    are worked on together up to this many weights. Raises ValueError for a parameter of any other rank.

    grad_scale: every gradient is taken times this, a number or fp32 [] on the device; None: as it is. The gradients
    themselves stay. copies: for a parameter a contiguous tensor of its shape that takes the new weights, in its dtype.
    Both are attributes, to be set before a step; a scale holds until it is set again.

    No matrix takes part in another's update. On one CPU thread the result is bit by bit the same for any chunk size,
    stacking and expert-parallel size, and so it is for matrices `on_gram`; for others a GPU picks its kernels by the
    batch size, so there it repeats bit by bit only for the same chunks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        polar_dtype: torch.dtype,
        chunk_weights: int = CHUNK_WEIGHTS,
    ) -> None:
        self.polar_dtype, self.chunk_weights = polar_dtype, chunk_weights
        self.grad_scale: float | torch.Tensor | None = None
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        self._batches: dict[int, tuple[list[int], list[Batch]]] = {}  # by group, with addresses
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(
                        f"NorMuon takes [m, n] or [E, m, n], got {list(parameter.shape)}"
                    )

    def init_state(self) -> None:
        """Zeros for every parameter that has no state yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    rows = parameter.detach()[..., 0]
                    self.state[parameter] = {
                        "momentum": torch.zeros_like(parameter),
                        "row_second_moment": torch.zeros_like(
                            rows, memory_format=torch.contiguous_format
                        ),
                    }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: not taken."""
        if closure is not None:
            raise ValueError("NorMuon takes no closure")
        self.init_state()
        scale = self._scale()
        for number, group in enumerate(self.param_groups):
            names = ("lr", "momentum", "beta2", "eps", "weight_decay")
            settings = {name: group[name] for name in names}
            for pieces, by_kernels in self._batches_of(number, group["params"]):
                if by_kernels:
                    # Triton is there on CUDA alone.
                    from trainer.kernels import normuon as kernels

                    polar = (POLAR_EXPRESS, SAFETY, TINY)
                    kernels.update_pieces(pieces, *polar, grad_scale=scale, **settings)
                else:
                    update_pieces(pieces, dtype=self.polar_dtype, grad_scale=scale, **settings)

    def _scale(self) -> torch.Tensor | None:
        if self.grad_scale is None or isinstance(self.grad_scale, torch.Tensor):
            return self.grad_scale
        device = self.param_groups[0]["params"][0].device
        return torch.full((), self.grad_scale, dtype=torch.float32, device=device)

    def _batches_of(self, number: int, parameters: list[torch.Tensor]) -> list[Batch]:
        """The batches of a group, made anew when a tensor lies elsewhere than in the step before: the views of 699
        matrices take the host 23 ms of 39 (one core), during which the device waits.
        """
        addresses = [at for parameter in parameters for at in self._addresses(parameter)]
        known = self._batches.get(number)
        if known is None or known[0] != addresses:
            batches = [
                (pieces, all(on_gram(piece, self.polar_dtype) for piece in pieces))
                for pieces in self._chunks(parameters)
            ]
            self._batches[number] = known = (addresses, batches)
        return known[1]

    def _addresses(self, parameter: torch.Tensor) -> list[int]:
        """Batches keep what they were made of alive, so nothing else can lie at these."""
        if parameter.grad is None:
            return [0]
        tensors = [parameter, parameter.grad, *self.state[parameter].values()]
        if parameter in self.copies:
            tensors.append(self.copies[parameter])
        return [tensor.data_ptr() for tensor in tensors]

    def _chunks(self, parameters: list[torch.Tensor]) -> Iterator[list[Piece]]:
        """Matrices of one shape, in order of their parameters, at most chunk_weights (at least one matrix) at a
        time.
        """
        shapes: dict[torch.Size, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape[-2:], []).append(parameter)
        for shape, same in shapes.items():
            free = room = max(1, self.chunk_weights // shape.numel())
            chunk: list[Piece] = []
            for parameter in same:
                whole = self._piece(parameter)
                start, count = 0, len(whole.weight)
                while start < count:
                    end = min(count, start + free)
                    chunk.append(_slice(whole, start, end))
                    start, free = end, free - (end - start)
                    if free == 0:
                        yield chunk
                        chunk, free = [], room
            if chunk:
                yield chunk

    def _piece(self, parameter: torch.Tensor) -> Piece:
        state, stack = self.state[parameter], (-1, *parameter.shape[-2:])
        copy = self.copies.get(parameter)
        return Piece(
            parameter.view(stack),
            parameter.grad.view(stack),  # type: ignore[union-attr]
            state["momentum"].view(stack),
            state["row_second_moment"].view(-1, parameter.shape[-2]),
            None if copy is None else copy.view(stack),
        )


def _slice(piece: Piece, start: int, end: int) -> Piece:
    return Piece(
        piece.weight[start:end],
        piece.grad[start:end],
        piece.momentum[start:end],
        piece.rows[start:end],
        None if piece.copy is None else piece.copy[start:end],
    )
