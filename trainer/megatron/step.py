"""One optimizer step on Megatron-Core: DDP, its forward-backward schedule, clipping, the update.

Scaling. The loss of a micro-batch is a sum with coefficients 1 / N_s, N_s the span's positions in the whole global
batch, so micro-batches and ranks simply add. Megatron divides instead: pipeline_parallel/schedules.py:253 by the
number of micro-batches M, ddp.py by the data-parallel size D (expert gradients too, whose sum over EP is made by the
dispatcher). So the loss handed over is multiplied by M * D. The router's balance loss is a mean over rows and takes
both divisions as they are (schedules.py:277, MoEAuxLossAutoScaler).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from trainer.batch import Batch
from trainer.config import KDConfig
from trainer.losses.chunk import WHOLE_VOCAB, VocabShard
from trainer.losses.objective import batch_loss, evaluate_batch
from trainer.losses.policy import PolicyLossConfig, num_without_targets, require_targets
from trainer.losses.report import loss_metrics
from trainer.losses.spans import span_counts
from trainer.megatron.attention import PackedRows
from trainer.megatron.ddp import with_ddp
from trainer.megatron.diverged import diverged
from trainer.megatron.graphs import GraphedLayers
from trainer.megatron.optimizer import build_optimizer, gradient_norm, update
from trainer.megatron.router import StudentRouter
from trainer.megatron.student import Student, build_student
from trainer.megatron.topology import Topology
from trainer.opd.config import OPDConfig
from trainer.router_load import router_metrics


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Numbers of one step, the same on every rank. values: flat names as in metrics.jsonl. seconds: by phase,
    this rank.
    """

    values: dict[str, float]
    seconds: dict[str, float]


class Trainer:
    """The student, its gradients and its optimizer on this rank. The type of config.loss names the objective."""

    def __init__(self, config: KDConfig | OPDConfig, topology: Topology, seq_len: int) -> None:
        self.config, self.topology = config, topology
        self.student = build_student(config.student, config, config.parallel, seq_len)
        self.model = with_ddp(self.student, config)
        self.optimizer = build_optimizer(config, self.model)
        self.routers = [
            module for module in self.student.modules() if isinstance(module, StudentRouter)
        ]
        self.shard = _vocab_shard(self.student, topology)
        self._graphed = self._graphed_layers() if config.cuda_graph else None
        self.student.config.finalize_model_grads_func = self._finalize
        self._schedule = get_forward_backward_func()

    def step(
        self, micro_batches: Sequence[Batch], learning_rate: float, clock: Clock
    ) -> StepReport:
        """Forward and backward over this rank's micro-batches (on its device), then one optimizer step.

        Raises DivergedError on every rank when any rank meets a number that is not finite, and AlignmentError when
        sampled tokens lack the targets that the objective needs; nothing has changed then.
        """
        self._require_targets(micro_batches)
        self._record(micro_batches[0])
        biases_LE = torch.stack([router.expert_bias for router in self.routers])
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        counts = self.topology.sum(sum(span_counts(batch) for batch in micro_batches))
        sums_CM = self.topology.sum(self._forward_backward(micro_batches, counts, clock))
        clock.mark("optimizer")
        self.optimizer.prepare_grads()
        grad_norm = gradient_norm(self.optimizer)
        values = loss_metrics(sums_CM)
        if not self._finite_everywhere(values["loss/total"], grad_norm):
            self._set_biases(biases_LE)
            again = partial(self._own_gradients, micro_batches, counts)
            raise diverged(
                values["loss/total"], grad_norm, self.student, self.config, self.topology, again
            )
        clip, shards = self.config.optimizer.clip, self.student.expert_shards
        update(self.optimizer, learning_rate, clip, grad_norm, shards)
        rows = self.topology.sum(sum(_num_rows(batch) for batch in micro_batches))
        values |= {"grad_norm": grad_norm} | self._router_values(int(rows))
        return StepReport(values=values, seconds=clock.read())

    @torch.no_grad()
    def evaluate(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """Sums of one batch on this rank for `loss_metrics`, counts being the span counts of the whole evaluation."""
        self.model.eval()
        hidden_BTD = self._hidden(self.model, batch)
        return evaluate_batch(
            hidden_BTD,
            self.student.output_layer.weight,
            batch,
            counts,
            self.config.loss,
            self.shard,
        )

    @property
    def graphs(self) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """The recorded layers, forward and backward, after the first step with `cuda_graph`."""
        assert self._graphed is not None, "cuda_graph is off"
        return self._graphed.graphs

    def _graphed_layers(self) -> GraphedLayers:
        graphed = GraphedLayers(self.student.decoder)
        self.topology.at_end.callback(graphed.release)
        return graphed

    def _record(self, batch: Batch) -> None:
        """Record the layers' graphs before the first step; of what recording leaves behind, `step` clears gradients."""
        if self._graphed is None or self._graphed.recorded:
            return
        self.model.train()
        # The schedule writes each step's scale into the tensor that the backward graph reads.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=self.topology.device))
        self._graphed.record(lambda: self._hidden(self.model, batch))
        self._forget_routing()

    def _forget_routing(self) -> None:
        """Clear what routers counted outside of a step."""
        for router in self.routers:
            router.local_tokens_per_expert.zero_()
            router.take_aux_loss()

    def _forward_backward(
        self, micro_batches: Sequence[Batch], counts: torch.Tensor, clock: Clock
    ) -> torch.Tensor:
        scale = len(micro_batches) * self.topology.dp_size

        def forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            clock.mark("forward")
            batch = next(batches)
            return self._hidden(model, batch), partial(loss_of, batch)

        def loss_of(batch: Batch, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            clock.mark("loss")
            loss, sums_CM = batch_loss(
                hidden_BTD,
                self.student.output_layer.weight,
                batch,
                counts,
                self.config.loss,
                self.shard,
            )
            clock.mark("backward")
            return loss * scale, sums_CM

        sums = self._schedule(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens_BT.shape[1],
            micro_batch_size=len(micro_batches[0].tokens_BT),
        )
        return torch.stack(sums).sum(dim=0)

    def _hidden(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Final hidden states [B, T, D], in the model's dtype."""
        keywords = {"fp32_output": False} if self.config.precision == "bf16" else {}
        hidden_SBD = model(
            batch.tokens_BT,
            None,
            None,
            packed_seq_params=PackedRows(document_BS=batch.doc_ids_BT),
            padding_mask=batch.doc_ids_BT < 0,
            **keywords,
        )
        if self.config.parallel.sequence_parallel:
            # The loss hands back the whole gradient of hidden on every rank: the backward of this gather only
            # splits it.
            hidden_SBD = gather_from_sequence_parallel_region(
                hidden_SBD, tensor_parallel_output_grad=False
            )
        return hidden_SBD.transpose(0, 1)

    def _finalize(self, model: list[torch.nn.Module], *arguments: Any, **keywords: Any) -> None:
        """Keep the router's counts, which Megatron clears after its bias update, then let it finish the gradients."""
        self.routed_LE = torch.stack([router.local_tokens_per_expert for router in self.routers])
        finalize_model_grads(model, *arguments, **keywords)

    def _finite_everywhere(self, loss: float, grad_norm: float) -> bool:
        finite = torch.isfinite(torch.tensor([loss, grad_norm], dtype=torch.float64)).all()
        everywhere = finite.to(self.topology.device, torch.int32).view(1)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        return bool(everywhere)

    def _set_biases(self, biases_LE: torch.Tensor) -> None:
        """Megatron moves the routers' biases in the backward pass, before a step is known to be good."""
        for router, bias_E in zip(self.routers, biases_LE, strict=True):
            router.expert_bias.copy_(bias_E)

    def _own_gradients(self, micro_batches: Sequence[Batch], counts: torch.Tensor) -> torch.Tensor:
        """The step's gradients and its sums [C, M] once more, of this rank alone; routers are left as they were."""
        self.model.zero_grad_buffer()
        self.student.config.finalize_model_grads_func = lambda *arguments, **keywords: None
        sums_CM = self._forward_backward(micro_batches, counts, Clock(self.topology.device))
        self.student.config.finalize_model_grads_func = self._finalize
        self._forget_routing()
        return sums_CM

    def _require_targets(self, micro_batches: Sequence[Batch]) -> None:
        """Every rank counts all ranks' tokens, so that all raise together."""
        of = self.config.loss
        if isinstance(of, PolicyLossConfig) and of.objective != "policy_gradient":
            missing = sum(num_without_targets(batch) for batch in micro_batches)
            require_targets(int(self.topology.sum(missing)), of)

    def _router_values(self, num_rows: int) -> dict[str, float]:
        """Routing of the step, num_rows its rows. Sums go over all ranks: tensor-parallel ones hold slices of them."""
        aux = torch.stack([router.take_aux_loss() for router in self.routers]).sum()
        for value in (aux, self.routed_LE):
            dist.all_reduce(value)
        biases_LE = torch.stack([router.expert_bias for router in self.routers])
        values = router_metrics(self.routed_LE, biases_LE)
        return values | {"router/aux_loss": float(aux) / max(num_rows, 1)}


class Clock:
    """Seconds by phase on one rank: `mark` starts a phase, which ends at the next mark; `read` ends the last one.

    On CUDA the marks are events in the stream, so that measuring does not wait until `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """The phase that starts now."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last read."""
        self.mark("end")
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            seconds[phase] = seconds.get(phase, 0.0) + elapsed
        self._marks.clear()
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _num_rows(batch: Batch) -> torch.Tensor:
    """Rows of the batch that hold a document: int64 []."""
    return (batch.doc_ids_BT >= 0).any(dim=1).sum()


def _vocab_shard(student: Student, topology: Topology) -> VocabShard:
    if topology.tp_size == 1:
        return WHOLE_VOCAB
    return VocabShard(
        start=topology.tp_rank * student.output_layer.weight.shape[0], group=topology.tp_group
    )
