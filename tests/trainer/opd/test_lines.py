"""Lines of an OPD run: the figures that a person looks for stand in them."""

from __future__ import annotations

from trainer.opd.lines import eval_line, step_line

_STEP = {
    "loss/total": 0.12345,
    "loss/reverse_kl/reasoning": 0.5,
    "loss/reverse_kl/control": 0.0125,
    "loss/reverse_kl/total": 0.4,
    "rollouts/valid": 0.875,
    "buffer/age": 1.0,
    "grad_norm": 2.0,
    "lr": 1e-4,
    "tokens_per_sec": 12345.6,
    "seconds/step": 4.0,
    "seconds/sampling": 2.0,
    "seconds/teacher": 1.0,
    "seconds/forward": 0.4,
    "seconds/loss": 0.2,
    "seconds/backward": 0.4,
    "seconds/optimizer": 0.2,
}


def test_a_step() -> None:
    assert step_line(3, 40, _STEP) == (
        "step 3/40  loss 0.1235  rkl r 0.500 c 0.013  valid 88%  age 1  grad 2.000  lr 1.00e-04  "
        "12,346 tok/s  4.00 s (sampling 50% teacher 25% forward 10% loss 5% backward 10% optimizer 5%)"
    )


def test_an_evaluation() -> None:
    values = {"eval/reverse_kl/final": 1.25, "eval/valid": 1.0, "eval/length/reasoning": 99.6}
    line = eval_line(40, values | {"eval/length/final": 7.0})
    assert line == "eval at step 40  rkl f 1.250  valid 100%  tokens r 100 f 7"
