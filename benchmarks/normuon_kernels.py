"""The Triton kernels of NorMuon one by one on a CUDA device: checked against float64, then timed at several launches.

    python -m benchmarks.normuon_kernels                  about a minute, most of it compilation; 7 GB

Pieces are expert tensors [256, 128, 1024] and [256, 1024, 128], eight of each in turn, so that no input is in L2. `ms`
is the least of the repeats for one piece, `student_ms` for the full student's 79 of this shape, `TB/s` counts what has
to move. A launch that fails is printed and left out. Nothing is written: the whole step is in benchmarks/optimizer.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from trainer.kernels import normuon as kernels
from trainer.kernels.normuon import LAUNCH, Launch, Scratch
from trainer.normuon import POLAR_EXPRESS, SAFETY, TINY, Piece, polar_express, update_pieces

POLAR = (POLAR_EXPRESS, SAFETY, TINY)
SETTINGS = {"lr": 0.02, "momentum": 0.95, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
SHAPES = ((256, 128, 1024), (256, 1024, 128))
LAYERS, PIECES, REPEATS = 79, 8, 4
VARIANTS: dict[str, list[tuple]] = {
    "gram": [(32, 8, 3), (32, 8, 4), (32, 4, 3), (64, 8, 1), (64, 8, 2), (64, 8, 3), (16, 8, 4)],
    "rows": [(64, 8, 2), (64, 8, 1), (64, 8, 3), (128, 8, 1), (64, 4, 2)],
    "apply": [
        (64, 1, 8, 1),
        (64, 2, 8, 1),
        (64, 4, 8, 2),
        (128, 1, 8, 1),
        (64, 1, 4, 1),
        (32, 8, 4, 2),
        (32, 32, 4, 2),
        (64, 16, 8, 2),
    ],
    "polar": [(8, 1)],
}
BYTES = {"gram": 14, "rows": 2, "apply": 12, "polar": 1}  # a weight
KINDS = ("random", "three decades", "low rank", "zero", "tiny")


def made(shape: tuple[int, int, int], kind: str) -> torch.Tensor:
    """Gradients of norm about 1e-3 [b, m, n], fp32 on CUDA; `tiny` 1e-12."""
    b, m, n = shape
    k = min(m, n)
    U_Bmn = torch.randn(shape, device="cuda")
    if kind == "three decades":
        left, right = (
            torch.linalg.qr(torch.randn(b, side, k, device="cuda"))[0] for side in (m, n)
        )
        U_Bmn = (left * torch.logspace(0, -2.8, k, device="cuda")) @ right.mT
    if kind == "low rank":
        U_Bmn = U_Bmn[:, :, :8] @ torch.randn(b, 8, n, device="cuda")
    U_Bmn *= {"zero": 0.0, "tiny": 1e-12}.get(kind, 1e-3) / U_Bmn.norm(dim=(1, 2), keepdim=True)
    return U_Bmn


def check_polar(launch: Launch) -> None:
    """X = Q U against float64 on the same U: relative error, singular values of both."""
    for _, m, n in SHAPES:
        for kind in KINDS:
            grad = made((8, m, n), kind)
            scratch = Scratch.of(8, m, n, grad.device)
            kernels.gram(grad, grad.clone(), scratch, 0.95, None, launch)
            kernels.polar(scratch, *POLAR, launch)
            u = scratch.u_Bmn.double()
            Q_Bkk = scratch.q_B2kk.double().sum(dim=1)
            X_Bmn = Q_Bkk @ u if m <= n else u @ Q_Bkk
            exact = polar_express(u, torch.float64)
            error = float((X_Bmn - exact).norm() / exact.norm().clamp_min(1e-300))
            both = [torch.linalg.svdvals(of.cpu()) for of in (X_Bmn, exact)]
            spans = " ".join(f"{float(of.min()):.4f}..{float(of.max()):.4f}" for of in both)
            same = torch.equal(scratch.u_Bmn, grad.bfloat16())
            print(f"polar {m}x{n} {kind:14} error {error:.1e} values {spans} u {same}")


def pieces_of(shape: tuple[int, int, int], count: int) -> list[Piece]:
    """Random pieces with copies."""

    def draw(*of: int, scale: float = 1e-3) -> torch.Tensor:
        return torch.randn(of, device="cuda") * scale

    return [
        Piece(
            draw(*shape, scale=0.02),
            draw(*shape),
            draw(*shape),
            draw(*shape[:2], scale=0.1).square_(),
            torch.empty(shape, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(count)
    ]


def check_step(launch: Launch) -> None:
    """Two pieces through the whole step: against float64, twice, and cut otherwise."""
    scale = torch.tensor(0.5, device="cuda")
    for _, m, n in SHAPES:
        pieces = pieces_of((16, m, n), 2)
        copies = [Piece(*(of.clone() for of in vars(piece).values())) for piece in pieces]
        cut = [Piece(*(of.clone() for of in vars(piece).values())) for piece in pieces]
        names = ("weight", "grad", "momentum", "rows")
        exact = [Piece(*(getattr(piece, name).double() for name in names)) for piece in pieces]
        start = [piece.weight.double() for piece in pieces]
        kernels.update_pieces(pieces, *POLAR, grad_scale=scale, launch=launch, **SETTINGS)
        kernels.update_pieces(copies, *POLAR, grad_scale=scale, launch=launch, **SETTINGS)
        for piece in cut:
            parts = [
                Piece(*(of[part] for of in vars(piece).values()))
                for part in (slice(0, 5), slice(5, 16))
            ]
            for part in parts:
                kernels.update_pieces([part], *POLAR, grad_scale=scale, launch=launch, **SETTINGS)
        update_pieces(exact, dtype=torch.float64, grad_scale=scale.double(), **SETTINGS)
        for got, again, parted, right, before in zip(
            pieces, copies, cut, exact, start, strict=True
        ):
            moved = right.weight - before
            error = float((got.weight.double() - right.weight).norm() / moved.norm())
            rows = float((got.rows.double() - right.rows).norm() / right.rows.norm())
            momentum = float((got.momentum.double() - right.momentum).norm())
            repeats = torch.equal(got.weight, again.weight), torch.equal(got.weight, parted.weight)
            copied = torch.equal(got.copy, got.weight.bfloat16())
            print(
                f"step {m}x{n} error of the move {error:.1e} rows {rows:.1e} momentum {momentum:.1e}"
                f" repeats {repeats} copy {copied}"
            )


def timed(call: Callable[[int], None], calls: int = PIECES) -> float:
    """Milliseconds of one call, the least over repeats of a CUDA graph of `calls` calls. A call before it compiles."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    least = float("inf")
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        least = min(least, start.elapsed_time(end) / calls)
    return least


def calls_of(
    pieces: list[Piece], scratches: list[Scratch], launch: Launch
) -> dict[str, Callable[[int], None]]:
    """Each kernel on piece `number`."""
    return {
        "gram": lambda i: kernels.gram(
            pieces[i].grad, pieces[i].momentum, scratches[i], 0.95, None, launch
        ),
        "polar": lambda i: kernels.polar(scratches[i], *POLAR, launch),
        "rows": lambda i: kernels.rows(
            pieces[i].rows, scratches[i], beta2=0.95, eps=1e-10, lr=1e-3, launch=launch
        ),
        "apply": lambda i: kernels.apply(
            pieces[i].weight, pieces[i].copy, scratches[i], 0.9999, launch
        ),
    }


def sweep(shape: tuple[int, int, int]) -> None:
    """Every kernel of one shape at every launch; then the step at the fastest of each."""
    pieces = pieces_of(shape, PIECES)
    scratches = [Scratch.of(*shape, pieces[0].weight.device) for _ in pieces]
    for name in ("gram", "polar", "rows"):  # something sensible in every scratch
        for number in range(PIECES):
            calls_of(pieces, scratches, LAUNCH)[name](number)
    weights, best = pieces[0].weight.numel(), LAUNCH
    for name, variants in VARIANTS.items():
        found: list[tuple[float, tuple]] = []
        for variant in variants:
            launch = replace(LAUNCH, **{name: variant})
            try:
                ms = timed(calls_of(pieces, scratches, launch)[name])
            except Exception as error:  # say so and go on with the others
                print(f"{name} {variant}: {type(error).__name__} {str(error)[:120]}", flush=True)
                continue
            found.append((ms, variant))
            rate = weights * BYTES[name] / ms / 1e9
            line = f"{name:6} {shape[1]}x{shape[2]} {variant!s:16} {ms:.4f} ms {rate:.2f} TB/s"
            print(f"{line} student_ms {ms * LAYERS:.2f}", flush=True)
        if found:
            best = replace(best, **{name: min(found)[1]})
    for several in (1, 2, 4):
        some = [pieces[i : i + several] for i in range(0, PIECES, several)]

        def step(number: int, some: list[list[Piece]] = some, best: Launch = best) -> None:
            kernels.update_pieces(some[number], *POLAR, launch=best, **SETTINGS)

        ms = timed(step, len(some)) / several
        print(f"step {shape} {several} together {ms:.4f} ms a piece {best}", flush=True)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check-only", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(torch.seed() % 2**31)
    for check in (check_polar, check_step):
        try:
            check(LAUNCH)
        except Exception as error:  # say so and go on with the others
            print(f"{check.__name__}: {type(error).__name__} {str(error)[:400]}", flush=True)
    if not arguments.check_only:
        for shape in SHAPES:
            sweep(shape)


if __name__ == "__main__":
    main()
