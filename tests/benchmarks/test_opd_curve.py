"""The runs of the on-policy curve: configs that load on both devices, and who is better."""

from __future__ import annotations

from pathlib import Path

from benchmarks.opd_curve import MEASURES, compare, demo_profile, synth_profile
from common.config import PROJECT_ROOT, load_config
from trainer.config import KDConfig
from trainer.opd.config import OPDConfig


def test_the_configs_of_both_profiles_load_and_share_a_student() -> None:
    for profile in (demo_profile(), synth_profile(Path("runs/kd_curve"))):
        (kd_name, *kd_keys), (opd_name, *opd_keys) = profile.kd, profile.opd
        kd = load_config(KDConfig, PROJECT_ROOT / kd_name, kd_keys)
        opd = load_config(OPDConfig, PROJECT_ROOT / opd_name, opd_keys)
        assert kd.student == opd.student and kd.device == opd.device
        assert Path(kd.dataset) == Path(opd.dataset) == profile.dataset
        assert kd.teacher == opd.teacher.name
        assert kd.batch.global_batch_size == profile.rows_a_step


def _run(warm: float, opd: float, kd: float, valid: tuple[float, float, float]) -> dict:
    def values(kl: float, share: float) -> dict[str, float]:
        return {name: share if name == "valid" else kl for name in MEASURES}

    return {
        "opd": {"0": values(warm, valid[0]), "8": values(opd, valid[1])},
        "kd": values(kd, valid[2]),
    }


def test_better_is_lower_for_kl_and_higher_for_validity_with_every_seed() -> None:
    runs = {"0": _run(2.0, 1.0, 1.5, (0.1, 0.3, 0.2)), "1": _run(2.0, 1.5, 1.25, (0.2, 0.5, 0.6))}
    found = compare(runs)
    assert found["mean"]["reverse_kl/total"] == {"warm": 2.0, "opd": 1.25, "kd": 1.375}
    assert found["opd_better_with_every_seed"]["valid"] == {"than_warm": True, "than_kd": False}
    assert found["opd_better_with_every_seed"]["reverse_kl/final"] == {
        "than_warm": True,
        "than_kd": False,
    }
