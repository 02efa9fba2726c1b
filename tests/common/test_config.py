"""Configs: overrides, named parts, and errors that say which key was meant."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from common import config
from common.config import Config, load_config
from common.errors import ConfigError


class Optim(Config):
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Size(Config):
    hidden: int


class Example(Config):
    INCLUDES: ClassVar[dict[str, str]] = {"size": "size"}
    seed: int = 0
    files: tuple[str, ...] = ()
    optim: Optim
    size: Size | None = None


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "small.yaml").write_text("hidden: 64\n")
    (tmp_path / "size" / "large.yaml").write_text("hidden: 1024\n")
    (tmp_path / "example.yaml").write_text("optim: {lr: 0.5}\nsize: small\n")
    monkeypatch.setattr(config, "CONFIG_ROOT", tmp_path)
    return tmp_path / "example.yaml"


def test_file_with_defaults_and_a_named_part(path: Path) -> None:
    loaded = load_config(Example, path)
    assert loaded.optim.lr == 0.5 and loaded.size == Size(hidden=64)
    assert loaded.resolved() == {
        "seed": 0,
        "files": [],
        "optim": {"lr": 0.5, "betas": [0.9, 0.95]},
        "size": {"hidden": 64},
    }


def test_overrides_reach_any_depth(path: Path) -> None:
    overrides = ("seed=7", "optim.lr=1e-1", "files=[a b.parquet, 'c=d']", "size=large")
    loaded = load_config(Example, path, overrides)
    assert (loaded.seed, loaded.optim.lr) == (7, 0.1)
    assert loaded.files == ("a b.parquet", "c=d") and loaded.size == Size(hidden=1024)
    assert load_config(Example, path, ("size=large", "size.hidden=3")).size == Size(hidden=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=1", "unknown key 'sead'; did you mean 'seed'"),
        ("optim.learning=1", "unknown key 'optim.learning'; .*lr"),
        ("optim.lr=-1", "optim.lr.*greater than 0.*-1"),
        ("optim.lr=fast", "optim.lr.*number.*fast"),
        ("seed", "no '='.*key.sub=value"),
        ("seed=[", "seed.*not YAML"),
        ("seed.deep=1", "'seed' is a single value|key 'seed'"),
        ("size=smal", "size/smal.yaml.*large, small.*did you mean 'small'"),
    ],
)
def test_wrong_override_names_the_key_and_the_remedy(
    path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Example, path, (override,))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\n", "key 'optim' is required"),
        ("- 1\n", "list.*mapping"),
        ("a: [\n", "not YAML"),
        ("optim: {lr: 1}\nseed: x\nfiles: 3\n", "seed.*; .*files"),
    ],
)
def test_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Example, tmp_path / "wrong.yaml")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(Example, tmp_path / "nowhere.yaml")


def test_models_are_frozen_and_their_digest_follows_content(path: Path) -> None:
    loaded = load_config(Example, path)
    with pytest.raises(ValidationError, match="frozen"):
        loaded.seed = 1  # type: ignore[misc]
    assert loaded.digest() == load_config(Example, path).digest()
    assert loaded.digest() != load_config(Example, path, ("seed=1",)).digest()
