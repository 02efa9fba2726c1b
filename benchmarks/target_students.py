"""Students at three distances from a teacher, and the gradients of full distillation that schemes are held against.

A student is the teacher with noise: on the last hidden state and on the lm_head, both relative to the norm of each
vector, and a temperature. For each, over all targets: the exact gradient of the lm_head under full KD, the part of it
that the teacher's distribution makes, the exact KL a position, and the gradient of the layer under the head.
The sums take minutes; they are kept in runs/ under a name that hashes what they were made from.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import xxhash

from benchmarks.smollm import CACHE, Teacher
from benchmarks.target_schemes import Entries

GHOST_SIZES = (12, 50)
CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """hidden_noise, head_noise: norm of the noise over the norm of the vector it is added to."""

    name: str
    hidden_noise: float
    head_noise: float = 0.0
    temperature: float = 1.0

    def weights(self, teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_PD and head_VD of this student, float32; the temperature divides the head."""
        hidden_PD = _noisy(torch.from_numpy(teacher.hidden_PD), self.hidden_noise, seed=1)
        head_VD = _noisy(torch.from_numpy(teacher.head_VD), self.head_noise, seed=2)
        return hidden_PD, head_VD / self.temperature


STUDENTS = (
    Student(name="near", hidden_noise=0.15),
    Student(name="middle", hidden_noise=0.6),
    Student(name="far", hidden_noise=0.6, head_noise=0.5, temperature=1.3),
)


def _noisy(values_ND: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise_ND = torch.randn(values_ND.shape, generator=generator)
    scale_N1 = size * values_ND.norm(dim=1, keepdim=True) / noise_ND.norm(dim=1, keepdim=True)
    return values_ND + scale_N1 * noise_ND


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Full KD of one student, sums over positions, float32.

    grad_VD: sum (q - P) h^T. teacher_VD: sum P h^T. ghost_KVD: the gradient of top-k with a ghost bucket, per size.
    lse_P, entropy_P, kl_P: logsumexp of the student, entropy of the teacher, KL(P || q). ghost_kl_KP: its own KL.
    body_PD: P W at each position, what the teacher's part sends to the layers below. body_grad_DD: sum h (qW - PW)^T.
    """

    grad_VD: torch.Tensor
    teacher_VD: torch.Tensor
    ghost_KVD: torch.Tensor
    ghost_kl_KP: torch.Tensor
    lse_P: torch.Tensor
    entropy_P: torch.Tensor
    kl_P: torch.Tensor
    body_PD: torch.Tensor
    body_grad_DD: torch.Tensor


def reference(student: Student, teacher: Teacher) -> Reference:
    """The sums of one student, from runs/ where they were made before."""
    made_from = xxhash.xxh3_64(teacher.hidden_PD.tobytes() + teacher.head_VD.tobytes())
    code = inspect.getsource(_full_distillation) + inspect.getsource(_ghost)
    made_from.update(f"{student} {GHOST_SIZES} {code}".encode())
    path = CACHE.with_name(f"{student.name}-{made_from.hexdigest()}.npz")
    names = [field.name for field in fields(Reference)]
    if not path.is_file():
        sums = _full_distillation(student, teacher)
        unfinished = path.with_suffix(".tmp.npz")
        np.savez(unfinished, **{name: getattr(sums, name).numpy() for name in names})
        unfinished.rename(path)
    with np.load(path) as stored:
        return Reference(**{name: torch.from_numpy(stored[name]) for name in names})


@torch.inference_mode()
def _full_distillation(student: Student, teacher: Teacher) -> Reference:
    hidden_PD, head_VD = student.weights(teacher)
    true_PD, true_VD = torch.from_numpy(teacher.hidden_PD), torch.from_numpy(teacher.head_VD)
    (num_positions, width), vocab_size = hidden_PD.shape, len(head_VD)
    sizes = len(GHOST_SIZES)
    sum_P_VD, sum_q_VD = torch.zeros(vocab_size, width), torch.zeros(vocab_size, width)
    ghost_KVD = torch.zeros(sizes, vocab_size, width)
    ghost_kl_KP = torch.zeros(sizes, num_positions)
    lse_P, entropy_P, kl_P = (torch.zeros(num_positions) for _ in range(3))
    body_PD, body_grad_DD = torch.zeros(num_positions, width), torch.zeros(width, width)
    for start in range(0, num_positions, CHUNK):
        at = slice(start, min(start + CHUNK, num_positions))
        h_CD = hidden_PD[at]
        logp_CV = (true_PD[at] @ true_VD.T).log_softmax(dim=1)
        logits_CV = h_CD @ head_VD.T
        lse_P[at] = logits_CV.logsumexp(dim=1)
        logq_CV = logits_CV.sub_(lse_P[at, None])
        p_CV, q_CV = logp_CV.exp(), logq_CV.exp()
        entropy_P[at] = -(p_CV * logp_CV).sum(dim=1)
        kl_P[at] = (p_CV * (logp_CV - logq_CV)).sum(dim=1)
        sum_P_VD.addmm_(p_CV.T, h_CD)
        sum_q_VD.addmm_(q_CV.T, h_CD)
        body_PD[at] = p_CV @ head_VD
        body_grad_DD += h_CD.T @ (q_CV @ head_VD - body_PD[at])
        for number, k in enumerate(GHOST_SIZES):
            grad_CV, ghost_kl_KP[number, at] = _ghost(logp_CV, logq_CV, k)
            ghost_KVD[number].addmm_(grad_CV.T, h_CD)
    return Reference(
        grad_VD=sum_q_VD - sum_P_VD,
        teacher_VD=sum_P_VD,
        ghost_KVD=ghost_KVD,
        ghost_kl_KP=ghost_kl_KP,
        lse_P=lse_P,
        entropy_P=entropy_P,
        kl_P=kl_P,
        body_PD=body_PD,
        body_grad_DD=body_grad_DD,
    )


def _ghost(
    logp_CV: torch.Tensor, logq_CV: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient to the logits and KL of KD on the top k ids and one bucket for the rest.

    L = -sum_top p log q - m log(1 - sum_top q): its gradient is q - p in the top and q (1 - m / Q) in the rest,
    m and Q being the rest's mass for teacher and student.
    """
    logp_CK, columns_CK = logp_CV.topk(k, dim=1)
    logq_CK = logq_CV.gather(1, columns_CK)
    p_CK, q_CK = logp_CK.exp(), logq_CK.exp()
    p_rest_C1 = (1 - p_CK.sum(dim=1, keepdim=True)).clamp(min=1e-7)
    q_rest_C1 = (1 - q_CK.sum(dim=1, keepdim=True)).clamp(min=1e-7)
    grad_CV = logq_CV.exp() * (1 - p_rest_C1 / q_rest_C1)
    grad_CV.scatter_(1, columns_CK, q_CK - p_CK)
    rest_C1 = p_rest_C1 * (p_rest_C1 / q_rest_C1).log()
    return grad_CV, (p_CK * (logp_CK - logq_CK)).sum(dim=1) + rest_C1[:, 0]


def angle_and_error(grad: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Degrees between two gradients, and |grad - exact| / |exact|.

    The angle is that of an isosceles triangle of unit vectors: an arc cosine would lose angles below 2 degrees.
    """
    chord = float((grad / grad.norm() - exact / exact.norm()).norm())
    return math.degrees(2 * math.asin(chord / 2)), float((grad - exact).norm() / exact.norm())


@torch.inference_mode()
def judge(
    entries: Entries, exact: Reference, hidden_PD: torch.Tensor, head_VD: torch.Tensor
) -> dict[str, float]:
    """How far a scheme's gradients and KL are from full KD for one student.

    angle (degrees), error: of the lm_head's gradient. body_error: of the layer under it. hidden_noise: of the teacher's
    part P W of the gradient to the hidden state, over positions. kl_rms, kl_mean: error of the KL estimate
    lse - sum T z - H(P) in nats, root mean square over positions, and of the mean.
    """
    shape = (len(hidden_PD), len(head_VD))
    places_2E = torch.stack([entries.rows_E, entries.columns_E])
    target_PV = torch.sparse_coo_tensor(places_2E, entries.weights_E, shape, check_invariants=False)
    target_VD = torch.sparse.mm(target_PV.t(), hidden_PD)
    grad_VD = exact.grad_VD + exact.teacher_VD - target_VD
    angle, error = angle_and_error(grad_VD, exact.grad_VD)
    body_PD = torch.sparse.mm(target_PV, head_VD)  # T W: its product with h is also sum T z
    noise_PD = body_PD - exact.body_PD
    scored_P = (body_PD * hidden_PD).sum(dim=1, dtype=torch.float64)
    kl_P = exact.lse_P - scored_P - exact.entropy_P
    return {
        "angle": angle,
        "error": error,
        "body_error": float((hidden_PD.T @ noise_PD).norm() / exact.body_grad_DD.norm()),
        "hidden_noise": float(noise_PD.norm() / exact.body_PD.norm()),
        **kl_errors(kl_P, exact.kl_P),
    }


def kl_errors(kl_P: torch.Tensor, exact_P: torch.Tensor) -> dict[str, float]:
    """Errors of an estimated KL in nats: root mean square over positions, and of the mean."""
    off_P = kl_P.double() - exact_P.double()
    return {"kl_rms": float(off_P.square().mean().sqrt()), "kl_mean": float(off_P.mean())}
