"""The student's layers as two recorded CUDA graphs, one forward and one backward, replayed for every micro-batch.

A step of the 80 layers is some ten thousand kernels; launched one by one they cost the host more time than the device
(12.3 ms a layer, measured). Recorded once, a pass is one launch. What is recorded: from the embedding's output through
all layers and the last norm, with the visible ranges of rows and the routers' counts; backward to every parameter.
What Megatron's hooks do, one parameter at a time, is one kernel after it: the gradients, static as all else, are added
into their fp32 buffers (those of routed experts are already there: trainer/kernels/experts_backward.py). Embedding,
rotation table, loss and optimizer run as ever.

A graph has its addresses fixed: inputs are copied into static tensors, weights, gradient buffers and counts are changed
in place by everybody. Activations live in the graph's own memory pool from the forward to the backward replay, so one
micro-batch is in flight at a time, as in Megatron's schedule without pipelining.

The stream. The default stream cannot be recorded, nor what waits for it: topology.py runs the whole process on a stream
of its own, and recording uses that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock

from common.errors import EngineError
from trainer.megatron.attention import PackedRows
from trainer.megatron.fused_layer import is_plain

WARM_UPS = 3  # the first compiles, the second finds what autotuning left; a third that nothing is lazy any more


class GraphedLayers:
    """Stands in for `forward` of a student's TransformerBlock once `record` has run.

    Without gradients (evaluation), and for rows that are not plain (sampling), the block runs as it is.
    """

    def __init__(self, block: TransformerBlock) -> None:
        self._block = block
        self._plain: Callable[..., torch.Tensor] = block.forward
        self._recorded: _Recorded | None = None
        self._recording = False
        block.forward = self

    @property
    def recorded(self) -> bool:
        """Whether `record` has run."""
        return self._recorded is not None

    @property
    def graphs(self) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """Forward and backward, once recorded, for measurements."""
        assert self._recorded is not None, "nothing is recorded"
        return self._recorded.forward_graph, self._recorded.backward_graph

    def record(self, run: Callable[[], Any]) -> None:
        """Record the pass that `run` makes through the block, with gradients, under Megatron's DDP. Its output is of no
        use, and gradient buffers and counts hold rubbish afterwards: the caller clears them.
        """
        self._recording = True
        try:
            run()
        finally:
            self._recording = False
        if self._recorded is None:
            raise EngineError("the pass to be recorded never went through the student's layers")

    def release(self) -> None:
        """Let go of the graphs; the block runs as it is.

        NCCL takes no group down while a graph holds its collectives (src/init.cc, commDestroySync), and a process that
        still has one never ends (pytorch/pytorch#115388).
        """
        if self._recorded is not None:
            self._recorded.forward_graph.reset()
            self._recorded.backward_graph.reset()
            self._recorded = None

    def __call__(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        rows = keywords["packed_seq_params"]
        if not (torch.is_grad_enabled() and is_plain(rows)):
            return self._plain(hidden_states, *arguments, **keywords)
        inputs = (hidden_states, keywords["rotary_pos_emb"], rows.document_BS)
        if self._recording:
            parameters = [p for p in self._block.parameters() if p.requires_grad]
            self._recorded = _Recorded(self._plain, parameters, *inputs)
        if self._recorded is None:
            return self._plain(hidden_states, *arguments, **keywords)
        return _Replay.apply(self._recorded, *inputs)


class _Recorded:
    """Both graphs and their static tensors: hidden [S, B, D], rotation [2, S, P], document [B, S], out, grad_out."""

    def __init__(
        self,
        block: Callable[..., torch.Tensor],
        parameters: list[torch.nn.Parameter],
        hidden: torch.Tensor,
        rotation: torch.Tensor,
        document: torch.Tensor,
    ) -> None:
        self.hidden = hidden.detach().clone().requires_grad_()
        self.rotation = rotation.detach().clone().requires_grad_(rotation.requires_grad)
        self.document = document.clone()
        self._block = block
        leaves = [self.hidden, self.rotation, *parameters]
        for _ in range(WARM_UPS):
            out = self._forward()
            self._gradients(out, leaves, torch.zeros_like(out))
            del out
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # Other threads allocate pinned memory meanwhile: only this one must not do what cannot be recorded.
        mode = {"stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward_graph, **mode):
            out = self._forward()
        self.grad_out = torch.zeros_like(out)
        with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), **mode):
            self.hidden_grad, self.rotation_grad, *grads = self._gradients(
                out, leaves, self.grad_out
            )
        self.out = out.detach()
        self._accumulation = _accumulation(parameters, grads)

    def backward(self) -> None:
        """Replay the backward pass and add the gradients of parameters to their sums."""
        self.backward_graph.replay()
        self._accumulation.add()

    @staticmethod
    def _gradients(
        out: torch.Tensor, leaves: list[torch.Tensor], grad_out: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Of the leaves that need one, contiguous; None for the others and for those that are already in the sums."""
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(out, needed, grad_out, allow_unused=True))
        found = [next(grads) if leaf.requires_grad else None for leaf in leaves]
        return [None if grad is None else grad.contiguous() for grad in found]

    def _forward(self) -> torch.Tensor:
        rows = PackedRows(document_BS=self.document)
        return self._block(
            self.hidden,
            None,
            rotary_pos_emb=self.rotation,
            packed_seq_params=rows,
            padding_mask=self.document < 0,
        )


def _accumulation(parameters: list[torch.nn.Parameter], grads: list[torch.Tensor | None]) -> Any:
    """Of the gradients that there are, into Megatron's fp32 buffers."""
    from trainer.kernels.accumulate import Accumulation

    found = [(p.main_grad, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
    return Accumulation([total for total, _ in found], [grad for _, grad in found])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorded: _Recorded,
        hidden: torch.Tensor,
        rotation: torch.Tensor,
        document: torch.Tensor,
    ) -> torch.Tensor:
        if (hidden.shape, document.shape) != (recorded.hidden.shape, recorded.document.shape):
            raise EngineError(
                "a micro-batch for the recorded layers",
                got=f"{list(document.shape)} rows and positions",
                expected=f"{list(recorded.document.shape)}, as recorded",
                remedy="make every micro-batch of training the same size, or set cuda_graph=false",
            )
        with torch.no_grad():
            recorded.hidden.copy_(hidden)
            recorded.rotation.copy_(rotation)
            recorded.document.copy_(document)
        recorded.forward_graph.replay()
        ctx.recorded = recorded
        return recorded.out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        recorded = ctx.recorded
        recorded.grad_out.copy_(grad_out)
        recorded.backward()
        return None, recorded.hidden_grad, recorded.rotation_grad, None
