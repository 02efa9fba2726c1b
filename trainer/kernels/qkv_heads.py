"""What the forward and backward kernels of queries, keys and values share: their shape, and a head before its norm.

A head's C channels are held as two tiles [M, P] of M tokens, left (channels 0 .. P - 1) and right (P .. C - 1): plane p
is channel p of both, so the rotation moves nothing between threads.

Shapes: T tokens, M tokens of a program, H query heads, G key-value heads, C head dim, P = C / 2, R rank of TPA,
Y = (H + 2 G) C, X the width of the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Program(NamedTuple):
    """Tokens and warps of a program, and the most registers of a thread (None: the compiler's choice).

    16 tokens to 4 warps: a thread holds 8 channels of a half, one load of 16 bytes; to 8 warps, 4 channels.
    """

    tokens: int
    warps: int
    registers: int | None = None


class QKVShape(NamedTuple):
    """Sizes of the projection and its tokens: token t is row t % rows of position t // rows. q_rank 0: not TPA."""

    rows: int
    heads: int
    groups: int
    head_dim: int
    q_rank: int
    kv_rank: int
    eps: float

    @property
    def bias_width(self) -> int:
        """Y, the channels of all queries, keys and values."""
        return (self.heads + 2 * self.groups) * self.head_dim

    @property
    def mixed_width(self) -> int:
        """X, the columns of the projection: Y, or those of the six factors of TPA."""
        ranks = self.q_rank + 2 * self.kv_rank
        factors = self.heads * self.q_rank + 2 * self.groups * self.kv_rank + ranks * self.head_dim
        return factors if self.q_rank else self.bias_width

    def offsets(self) -> tuple[int, ...]:
        """First columns of a_query, a_key, a_value, b_query, b_key, b_value in a row of TPA's projection."""
        q, kv = self.q_rank, self.kv_rank
        widths = [self.heads * q, self.groups * kv, self.groups * kv]
        widths += [q * self.head_dim, kv * self.head_dim]
        return tuple(sum(widths[:n]) for n in range(6))


@triton.jit
def load_halves(at, P: tl.constexpr):
    """Both halves of a head in fp32; `at`: pointers to the left one."""
    return tl.load(at).to(tl.float32), tl.load(at + P).to(tl.float32)


@triton.jit
def load_factors(x, B_AT: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """R left and R right halves of b [M, R, C]. x: pointers [M, 1] to the rows of the projection."""
    p = tl.arange(0, P)
    lefts, rights = (), ()
    for r in tl.static_range(R):
        left, right = load_halves(x + (B_AT + r * 2 * P) + p[None, :], P)
        lefts = lefts + (left,)  # noqa: RUF005
        rights = rights + (right,)  # noqa: RUF005
    return lefts, rights


@triton.jit
def head_slot(h, PER: tl.constexpr, FIRST: tl.constexpr, SLOTS: tl.constexpr):
    """Of head h: PER heads a group of SLOTS heads, from the group's head FIRST on."""
    return h // PER * SLOTS + FIRST + h % PER


@triton.jit
def load_head(x, bias, a_at, slot, R: tl.constexpr, P: tl.constexpr):
    """What `before_norm` makes the head at `slot` of [q .. q k v | q .. q k v | ..] of, as it is stored: both halves of
    the projection or, with TPA, of the bias, and R numbers a [M, 1].

    Loops over heads load that of the next head before they compute one: a load takes longer than a head's arithmetic.
    """
    p = tl.arange(0, P)
    # For all M tokens: a load of [1, P] has a layout of its own, and a head's numbers would be moved into it and back.
    at = (x if R == 0 else tl.broadcast_to(bias, x.shape)) + slot * 2 * P + p[None, :]
    held = (tl.load(at), tl.load(at + P))
    for r in tl.static_range(R):
        held = held + (tl.load(x + a_at + r),)  # noqa: RUF005
    return held


@triton.jit
def before_norm(held, lefts, rights, R: tl.constexpr):
    """Halves of a head as projected, bias added, fp32; held: of `load_head`."""
    left, right = held[0].to(tl.float32), held[1].to(tl.float32)
    for r in tl.static_range(R):
        a = held[2 + r].to(tl.float32) * (1.0 / R)
        left += a * lefts[r]
        right += a * rights[r]
    return left, right
