"""Steps and evaluations of an OPD run as people read them. Pure."""

from __future__ import annotations

_PHASES = ("sampling", "teacher", "forward", "loss", "backward", "optimizer")


def step_line(step: int, steps: int, values: dict[str, float]) -> str:
    """rkl: mean log p_S - log p_T of the step's sampled tokens; r, f and c are reasoning, final and control tokens."""
    phases = " ".join(
        f"{phase} {100 * values[f'seconds/{phase}'] / values['seconds/step']:.0f}%"
        for phase in _PHASES
    )
    return (
        f"step {step}/{steps}  loss {values['loss/total']:.4f}  {_reverse_kl('loss', values)}  "
        f"valid {100 * values['rollouts/valid']:.0f}%  age {values['buffer/age']:.0f}  "
        f"grad {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
        f"{values['tokens_per_sec']:,.0f} tok/s  {values['seconds/step']:.2f} s ({phases})"
    )


def eval_line(step: int, values: dict[str, float]) -> str:
    """The same of held-out prompts."""
    return (
        f"eval at step {step}  {_reverse_kl('eval', values)}  valid {100 * values['eval/valid']:.0f}%  "
        f"tokens r {values['eval/length/reasoning']:.0f} f {values['eval/length/final']:.0f}"
    )


def _reverse_kl(prefix: str, values: dict[str, float]) -> str:
    found = [
        f"{name[0]} {values[f'{prefix}/reverse_kl/{name}']:.3f}"
        for name in ("reasoning", "final", "control")
        if f"{prefix}/reverse_kl/{name}" in values
    ]
    return "rkl " + " ".join(found)
