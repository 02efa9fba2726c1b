"""Every YAML of configs/ is of exactly one kind, and a misspelt key is answered with the nearest one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from common.config import CONFIG_ROOT, Config, load_config
from common.errors import ConfigError
from datastore.data_config import DataConfig
from datastore.serve_app import ServeConfig
from datastore.teacher import TeacherConfig
from trainer.config import KDConfig
from trainer.opd.config import OPDConfig
from trainer.parameters import parameter_counts
from trainer.student_config import StudentConfig

KINDS = (DataConfig, TeacherConfig, ServeConfig, StudentConfig, KDConfig, OPDConfig)
FOLDERS = {
    "data": DataConfig,
    "teacher": TeacherConfig,
    "serve": ServeConfig,
    "student": StudentConfig,
}
FILES = sorted(CONFIG_ROOT.rglob("*.yaml"))


def _name(path: Path) -> str:
    return str(path.relative_to(CONFIG_ROOT))


def _kind(path: Path) -> type[Config]:
    if path.parent == CONFIG_ROOT:
        return OPDConfig if path.stem.endswith("opd") else KDConfig
    return FOLDERS[path.parent.name]


def _accepts(kind: type[Config], path: Path) -> bool:
    try:
        load_config(kind, path)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_is_of_the_one_kind_of_its_folder(path: Path) -> None:
    assert [kind for kind in KINDS if _accepts(kind, path)] == [_kind(path)]


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_misspelt_key_is_answered_with_the_right_one(path: Path) -> None:
    kind = _kind(path)
    key = max(yaml.safe_load(path.read_text()), key=len)
    misspelt = key[:-1] + "x"
    with pytest.raises(ConfigError, match=f"unknown key '{misspelt}'.*did you mean '{key}'"):
        load_config(kind, path, (f"{misspelt}=1",))


def test_offline_pipeline_needs_no_paths() -> None:
    data = load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml")
    base = load_config(KDConfig, CONFIG_ROOT / "base.yaml")
    assert base.dataset == data.out
    assert (
        load_config(TeacherConfig, CONFIG_ROOT / "teacher" / f"{base.teacher}.yaml").name
        == base.teacher
    )
    opd = load_config(OPDConfig, CONFIG_ROOT / "opd.yaml")
    assert (opd.dataset, opd.init_from.run, opd.teacher.name) == (data.out, base.run, base.teacher)


def test_locked_student_is_the_one_of_the_document() -> None:
    text = (CONFIG_ROOT.parent / "docs" / "architecture.md").read_text()
    student = load_config(StudentConfig, CONFIG_ROOT / "student" / "vpmoe.yaml")
    counts = parameter_counts(student)
    assert f"| routed experts 79 x 256 x 263,296 | {counts['routed_experts']:,} |" in text
    for component in set(counts) - {"routed_experts"}:
        assert re.search(rf"(?<![\d,]){counts[component]:,}(?!,?\d)", text), component
