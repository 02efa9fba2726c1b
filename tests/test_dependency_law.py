"""Who may import whom: common <- datastore <- trainer, engines each in one place, pure modules without I/O."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"common", "datastore", "trainer", "demo"}
MAY_IMPORT = {
    "common": {"common"},
    "datastore": {"common", "datastore"},
    "trainer": {"common", "datastore", "trainer"},
    "demo": {"common", "datastore", "demo"},
}
TRAINER_MAY_TAKE = {
    f"datastore.{name}"
    for name in [
        "types",
        "manifest",
        "reader",
        "order",
        "stream",
        "target",
        "codec",
        "alignment",
        "budget",
        "harmony",
        "scoring_client",
        "rollout",
        "rollouts",
        "rollout_reader",
        "rollout_write",
        "harmony_grammar",
        "prompts",
    ]
}
ENGINES = {
    "vllm": ("datastore.vllm_scorer", "datastore.vllm_plugin"),
    "fastapi": ("datastore.serve_app",),
    "uvicorn": ("datastore.serve",),
    "ray": ("datastore.cluster",),
    "megatron": ("trainer.megatron",),
    "transformer_engine": ("trainer.megatron",),
}
# `vpmoe-train export` copies these files of trainer/hf beside the weights: they stand alone, and import each other by a
# relative name, as transformers wants it.
COPIED = {"configuration_vpmoe", "modeling_vpmoe"}
STANDS_ALONE = {"torch", "transformers", "math", "functools", *COPIED}
HEAVY = {"torch", "vllm", "megatron", "transformers", "transformer_engine"}
PURE = {
    *(
        f"datastore.{name}"
        for name in ["types", "harmony", "split", "packing", "order", "target", "codec"]
    ),
    *("datastore.codec_ids", "datastore.codec_masses", "datastore.codec_target"),
    *("datastore.budget", "datastore.alignment", "datastore.estimate", "trainer.batch"),
    *("datastore.scoring_protocol", "datastore.serve_prompt", "datastore.harmony_grammar"),
    *("trainer.export_names", "trainer.export_card", "trainer.opd.curriculum"),
}
IMPURE_IMPORTS = {
    "os",
    "pathlib",
    "logging",
    "subprocess",
    "tempfile",
    "shutil",
    "torch.distributed",
}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str) -> set[str]:
    """Every absolute module name that the source imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module in COPIED, "write the whole name of a module"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def faults(module: str, names: set[str]) -> list[str]:
    """The imports of `module` that break the law."""
    package = module.partition(".")[0]
    tops = {name.partition(".")[0] for name in names}
    found = [f"{module} imports {top}" for top in tops & OURS - MAY_IMPORT[package]]
    found += [f"{module} imports {top}" for top in tops & {"tests", "benchmarks"}]
    if module in {f"trainer.hf.{name}" for name in COPIED}:
        found += [f"copied {module} imports {top}" for top in tops - STANDS_ALONE]
    elif tops & COPIED:
        found += [f"{module} imports {top} by a relative name" for top in tops & COPIED]
    if package == "common":
        found += [f"{module} imports {top}" for top in tops & HEAVY]
    if package == "trainer":
        taken = {n for n in names if _within(n, "datastore") and n != "datastore"}
        allowed = {n for n in taken if any(_within(n, ok) for ok in TRAINER_MAY_TAKE)}
        found += [f"{module} takes {name}" for name in taken - allowed]
    for engine, homes in ENGINES.items():
        if engine in tops and not any(_within(module, home) for home in homes):
            found.append(f"{module} imports {engine}")
    if module in PURE:
        impure = {n for n in names if any(_within(n, bad) for bad in IMPURE_IMPORTS)}
        found += [f"pure {module} imports {name}" for name in impure]
    return sorted(found)


FILES = sorted(p for package in OURS for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_module_keeps_the_law(path: Path) -> None:
    assert faults(_module(path), imports_of(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("common.files", "import torch"),
        ("common.config", "def f():\n    from datastore import types"),
        ("datastore.build", "from trainer.batch import to_tensors"),
        ("datastore.score", "import vllm"),
        ("datastore.score_fleet", "def f():\n    import ray"),
        ("trainer.kd", "from megatron.core import parallel_state"),
        ("trainer.kd", "from datastore.score import score_dataset"),
        ("trainer.kd", "from datastore import build"),
        ("trainer.cli", "import demo.sample"),
        ("datastore.packing", "from pathlib import Path"),
        ("trainer.batch", "import torch.distributed as dist"),
        ("demo.run", "import tests.conftest"),
        ("trainer.hf.modeling_vpmoe", "import numpy"),
        ("trainer.hf.modeling_vpmoe", "from common import tokenizer"),
        ("trainer.export", "from .modeling_vpmoe import VpMoEModel"),
    ],
)
def test_each_rule_bites(module: str, source: str) -> None:
    assert faults(module, imports_of(source))


def test_pure_modules_exist() -> None:
    assert {_module(path) for path in FILES} >= PURE
