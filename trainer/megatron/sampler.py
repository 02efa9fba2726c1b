"""Sampling from the student: batched, cached decoding through the modules that train, with continuous batching.

A fixed number of slots decode together, one token a step. A slot whose rollout has ended is filled again from the
queue, so short rollouts do not wait for long ones. A prompt but its last token is prefilled: several prompts packed
into one row that runs through training's own path and leaves its keys and values in the cache
(trainer/megatron/cached.py). Its last token is the first to be decoded, so every token is sampled in the same place.

Prompts wait until slots // 8 slots are free, or no rollout runs, or all that wait fit: a prefill pass costs about as
much for one prompt as for a row of them.

What a rollout is depends on its prompt, its key and the weights alone, up to floating point of products in other
batches (trainer/opd/draw.py). Log-probabilities: fp32 log-softmax of fp32 logits, as in training. Nothing of the model
changes: no gradient, no counter of a router, no generator.

Expert parallelism: ranks of an EP group must pass through the experts together, so they agree on every round; those
that have nothing run empty rows and slots. The host looks at the device after every step on CPU, and after every 8
steps on CUDA: a rollout that ends in between waits for the look.

sampling.cuda_graph: a step of decoding is some 60 small kernels a layer, so on CUDA the host sets the pace unless a
whole step is captured once and replayed. It is captured anew in every call: nothing then rests on where the weights lay
before.

Shapes: B slots, S positions of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from common.errors import ConfigError, EngineError, FormatError
from datastore.types import SPAN_FINAL, SPAN_REASONING
from trainer.megatron.attention import CoreAttention
from trainer.megatron.cached import DecodeStep, KVCache, prefill_rows
from trainer.megatron.step import Clock
from trainer.megatron.student import Student
from trainer.megatron.topology import Topology
from trainer.opd.config import OPDConfig
from trainer.opd.slots import HARMONY, Grammar, Sample, SamplePrompt, Slots

_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True, kw_only=True)
class SamplingReport:
    """Of one call on this rank. Seconds on the device; steps of all slots; tokens sampled; slots there are."""

    prefill_sec: float
    decode_sec: float
    prefills: int
    steps: int
    tokens: int
    slots: int

    @property
    def occupied(self) -> float:
        """Mean share of slots with a rollout over the steps: each of these sampled one token a step."""
        return self.tokens / (self.steps * self.slots) if self.steps else 0.0


class Sampler:
    """Samples with the weights that the student has at the time of the call.

    student: the module itself, without its wrappers. seq_len: tokens of the longest document, and of a prefilled row.
    grammar: when a rollout ends, and its spans. The cache is taken from the device's memory once, here. report: of the
    last call. Raises ConfigError where `require_layout` does.
    """

    def __init__(
        self,
        student: Student,
        config: OPDConfig,
        topology: Topology,
        seq_len: int,
        grammar: Grammar = HARMONY,
    ) -> None:
        require_layout(config)
        self._cuda_graph = config.sampling.cuda_graph
        self.student, self.seq_len, self.num_slots = student, seq_len, config.sampling.slots
        self.report: SamplingReport | None = None
        self._device = topology.device
        self._ep_group = parallel_state.get_expert_model_parallel_group()
        # One shape where attention is compiled; elsewhere rows are no longer than they must be.
        self.row_len = seq_len if config.core_attention == "triton" else None
        self.steps_between_looks = _STEPS_BETWEEN_LOOKS[topology.device.type]
        layers = [module for module in student.modules() if isinstance(module, CoreAttention)]
        caps = {
            SPAN_REASONING: config.sampling.max_reasoning,
            SPAN_FINAL: config.sampling.max_final,
        }
        longest = min(sum(caps.values()), seq_len)
        self._cache = KVCache(layers, self.num_slots, seq_len)
        self._slots = Slots(grammar, self.num_slots, longest, caps, topology.device)

    def sample(
        self, prompts: Sequence[SamplePrompt], progress: Callable[[int], None] = lambda tokens: None
    ) -> list[Sample]:
        """A rollout of each prompt of this rank, in their order. progress: told the tokens sampled so far, often.

        Every rank of an EP group calls it, also without prompts. Raises FormatError for a prompt that leaves no room,
        EngineError where log-probabilities are not finite.
        """
        limits = [self._room(number, prompt) for number, prompt in enumerate(prompts)]
        queue = deque(enumerate(prompts))
        running: dict[int, int] = {}  # prompt's number by slot
        samples: dict[int, Sample] = {}
        clock, passes, steps = Clock(self._device), 0, 0
        self._slots.clear()
        with _undisturbed(self.student):
            step = self._captured() if self._cuda_graph else self._step
            while self._goes_on(bool(queue or running)):
                clock.mark("prefill")
                started = self._refill(queue, running, limits)
                passes += self._prefill(started)
                clock.mark("decode")
                for _ in range(self.steps_between_looks):
                    step()
                steps += self.steps_between_looks
                samples |= self._collect(running)
                progress(int(self._slots.taken))
        seconds = clock.read()
        self.report = SamplingReport(
            prefill_sec=seconds.get("prefill", 0.0),
            decode_sec=seconds.get("decode", 0.0),
            prefills=passes,
            steps=steps,
            tokens=int(self._slots.taken),
            slots=self.num_slots,
        )
        return [samples[number] for number in range(len(prompts))]

    def _room(self, number: int, prompt: SamplePrompt) -> int:
        """Sampled tokens that fit behind the prompt and before one <|endoftext|>."""
        length = len(prompt.tokens_T)
        if not 0 < length < self.seq_len - 1:
            raise FormatError(
                f"prompt {number} (key {prompt.key:#x}) cannot be sampled from",
                got=f"{length} tokens",
                expected=f"1..{self.seq_len - 2}: a sampled token and <|endoftext|> must fit the {self.seq_len}",
                remedy="leave out prompts that fill a row",
            )
        return self.seq_len - 1 - length

    def _refill(
        self, queue: deque[tuple[int, SamplePrompt]], running: dict[int, int], limits: list[int]
    ) -> list[tuple[int, SamplePrompt]]:
        """Give waiting prompts to free slots, by the rule on top of this file."""
        free = [slot for slot in range(self.num_slots) if slot not in running]
        count = min(len(free), len(queue))
        if count == 0 or (running and count < min(self.num_slots // 8, len(queue))):
            return []
        taken = [queue.popleft() for _ in range(count)]
        started = [(slot, prompt) for slot, (_, prompt) in zip(free, taken, strict=False)]
        running |= {slot: number for slot, (number, _) in zip(free, taken, strict=False)}
        self._slots.occupy(started, [limits[number] for number, _ in taken])
        return started

    def _prefill(self, started: list[tuple[int, SamplePrompt]]) -> int:
        """Passes of one row each over the prompts but their last tokens; returns their number."""
        parts = [(slot, p.tokens_T[:-1]) for slot, p in started if len(p.tokens_T) > 1]
        rows = _next_fit(parts, self.seq_len)
        passes = self._largest(len(rows))
        for row in [*rows, *([[]] * (passes - len(rows)))]:
            # As long on every rank of the group, which exchanges equal numbers of tokens.
            length = self.row_len or self._largest(
                max(1, sum(len(tokens_T) for _, tokens_T in row))
            )
            tokens_BS, rows_ = prefill_rows(self._cache, row, length, self._device)
            self.student(tokens_BS, None, None, packed_seq_params=rows_)
        return passes

    def _step(self) -> None:
        """One token in every slot."""
        slots = self._slots
        step = DecodeStep(cache=self._cache, position_B=slots.position_B)
        hidden_SBD = self.student(slots.token_B.unsqueeze(1), None, None, packed_seq_params=step)
        slots.advance(_logits(hidden_SBD[0], self.student.output_layer.weight))

    def _captured(self) -> Callable[[], None]:
        """`_step` as a graph of its kernels. No rollout runs yet, so that the steps made for it change nothing."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (data, collectives, the teacher's) may use CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph.replay

    def _collect(self, running: dict[int, int]) -> dict[int, Sample]:
        """The rollouts that have ended, by number of their prompt; their slots are free."""
        active = self._slots.active_B.tolist()
        ended = [slot for slot in running if not active[slot]]
        if not ended:
            return {}
        samples = {}
        for slot, sample in zip(ended, self._slots.read(ended), strict=True):
            number = running.pop(slot)
            if not np.isfinite(sample.logprobs_S).all():
                raise EngineError(
                    f"the log-probabilities of sample {number} are not finite",
                    remedy="look at the weights: resume from a checkpoint before they went wrong",
                )
            samples[number] = sample
        return samples

    def _goes_on(self, here: bool) -> bool:
        return self._largest(int(here)) > 0

    def _largest(self, number: int) -> int:
        """The largest of the EP group's numbers."""
        if self._ep_group.size() == 1:
            return number
        value = torch.tensor([number], device=self._device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._ep_group)
        return int(value)


def require_layout(config: OPDConfig) -> None:
    """Raises ConfigError for a layout that cannot sample (so); needs no process group."""
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"sampling with parallel.tensor={config.parallel.tensor} (one decoded token is no sequence to split)",
            remedy="set parallel.tensor=1 and spread with parallel.expert and data parallelism",
        )
    alone = config.parallel.expert == 1 and config.expert_compute == "triton"
    if config.sampling.cuda_graph and not (alone and config.device == "cuda"):
        raise ConfigError(
            "sampling.cuda_graph where there is no CUDA, the host waits for the experts' token counts, or ranks "
            "exchange tokens (a decoding step recorded with exchanges has never been run)",
            got=f"device: {config.device}, parallel.expert={config.parallel.expert}, "
            f"expert_compute: {config.expert_compute}",
            expected="device: cuda, parallel.expert=1, expert_compute: triton",
            remedy="set sampling.cuda_graph=false",
        )


def _next_fit(
    parts: list[tuple[int, np.ndarray]], row_len: int
) -> list[list[tuple[int, np.ndarray]]]:
    """The parts in order, in rows of at most row_len tokens."""
    rows: list[list[tuple[int, np.ndarray]]] = []
    room = 0
    for slot, tokens_T in parts:
        if len(tokens_T) > room:
            rows.append([])
            room = row_len
        rows[-1].append((slot, tokens_T))
        room -= len(tokens_T)
    return rows


def _logits(hidden_BD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """[B, V] fp32 (fp64 of fp64), as trainer/losses/fused_linear.py has them: bf16 operands on CUDA, widened on CPU."""
    wide = torch.promote_types(head_VD.dtype, torch.float32)
    if head_VD.is_cuda and head_VD.dtype != wide:
        return torch.mm(hidden_BD, head_VD.t(), out_dtype=wide)
    return hidden_BD.to(wide) @ head_VD.to(wide).t()


@contextlib.contextmanager
def _undisturbed(student: Student) -> Iterator[None]:
    """Evaluation mode without gradients: routers count nothing then. Not inference mode: Megatron keeps the angles of
    fixed rotary embeddings (lru_cache), and training could not use an inference tensor.
    """
    training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(training)
