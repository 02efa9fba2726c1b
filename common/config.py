"""Configs: YAML files parsed into frozen typed models, `key.sub=value` overrides, unknown keys refused.

A model lives beside the code that it configures and derives from `Config`. `INCLUDES` names the keys whose value
may be a name instead of a mapping: `student: vpmoe` reads configs/student/vpmoe.yaml before overrides apply.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError
from common.files import canonical_json, sha256_bytes

PROJECT_ROOT = Path(__file__).resolve().parent.parent
CONFIG_ROOT = PROJECT_ROOT / "configs"


class Config(BaseModel):
    """Base of every config model: frozen, strict about unknown keys, no silent type coercion of numbers to text."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    INCLUDES: ClassVar[dict[str, str]] = {}

    def resolved(self) -> dict[str, Any]:
        """The whole config as plain JSON values, defaults written out."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hex sha256 of the resolved config."""
        return sha256_bytes(canonical_json(self.resolved()))


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(cls: type[AnyConfig], path: Path, overrides: tuple[str, ...] = ()) -> AnyConfig:
    """Read `path`, apply `key.sub=value` overrides (values are YAML), validate into `cls`.

    Raises ConfigError naming the file, the key and the nearest valid key.
    """
    raw = read_mapping(Path(path))
    for key, folder in cls.INCLUDES.items():
        if isinstance(raw.get(key), str):
            raw[key] = read_mapping(named_config(folder, raw[key]))
    return override_config(cls, raw, overrides, str(path))


def override_config(
    cls: type[AnyConfig], raw: dict[str, Any], overrides: tuple[str, ...], where: str
) -> AnyConfig:
    """Apply `key.sub=value` overrides to plain values, which change, and validate them into `cls`.

    Raises ConfigError, its message led by `where`.
    """
    for override in overrides:
        _apply_override(raw, override, cls)
    return parse_config(cls, raw, where)


def named_config(folder: str, name: str) -> Path:
    """The file configs/<folder>/<name>.yaml; ConfigError listing the names that exist."""
    path = CONFIG_ROOT / folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (CONFIG_ROOT / folder).glob("*.yaml"))
        raise ConfigError(
            f"no config configs/{folder}/{name}.yaml",
            expected=f"one of {', '.join(known) or '(none)'}",
            remedy=_nearest(name, known),
        )
    return path


def parse_config(cls: type[AnyConfig], raw: dict[str, Any], where: str) -> AnyConfig:
    """Validate plain values into `cls`; ConfigError with every fault, one per line."""
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        faults = [_explain(cls, fault) for fault in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(faults)) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises ConfigError when it is absent, no YAML or holds something else."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist", remedy="check the path") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path}", got=type(raw).__name__, expected="a mapping of keys")
    return raw


def _apply_override(raw: dict[str, Any], override: str, cls: type[Config]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            "an override has no '='",
            got=repr(override),
            expected="key.sub=value, e.g. seq_len=1024",
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {key}: the value is not YAML: {error}") from None
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: '{parent}' is a single value, not a group of keys")
        node = child
    if last in cls.INCLUDES and not parents and isinstance(value, str):
        value = read_mapping(named_config(cls.INCLUDES[last], value))
    node[last] = value


def _explain(cls: type[Config], fault: Any) -> str:
    location = [part for part in fault["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_nearest(location[-1], _keys_at(cls, location[:-1]))}"
    if fault["type"] == "missing":
        return f"key '{key}' is required"
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message
    # A group of keys is not repeated whole: the message names the key in it.
    got = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
    return f"key '{key}': {message}{got}"


def _keys_at(cls: type[BaseModel], location: list[str]) -> list[str]:
    model: type[BaseModel] | None = cls
    for part in location:
        field = model.model_fields.get(part) if model else None
        model = _model_of(field.annotation) if field else None
    return sorted(model.model_fields) if model else []


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (model := _model_of(argument)) is not None:
            return model
    return None


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid keys: {', '.join(known)}" if known else "no keys are valid here"


def flat_values(values: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their dotted keys: {"render.reasoning": "high", "sources.0.1": 7}."""
    if not isinstance(values, dict | list):
        return {key: values}
    children = values.items() if isinstance(values, dict) else enumerate(values)
    return {
        name: leaf
        for child, inner in children
        for name, leaf in flat_values(inner, f"{key}.{child}" if key else str(child)).items()
    }
