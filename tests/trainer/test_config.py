"""KD configs: the shipped files parse, and what cannot run is refused by name with the way out."""

from __future__ import annotations

import pytest
import yaml

from common.config import CONFIG_ROOT, load_config, parse_config
from common.errors import ConfigError
from trainer.config import KDConfig, ParallelConfig
from trainer.megatron.topology import check_layout, check_run
from trainer.parameters import parameter_counts
from trainer.student_config import StudentConfig

DEMO, BASE = CONFIG_ROOT / "demo.yaml", CONFIG_ROOT / "base.yaml"


@pytest.mark.parametrize("path", [DEMO, BASE], ids=["demo", "base"])
def test_shipped_configs_parse_and_lay_out(path) -> None:
    config = load_config(KDConfig, path)
    check_layout(config.parallel)
    assert config.student.vocab_size == 201_088


@pytest.mark.parametrize(
    "path", sorted((CONFIG_ROOT / "student").glob("*.yaml")), ids=lambda p: p.stem
)
def test_students_parse(path) -> None:
    parse_config(StudentConfig, yaml.safe_load(path.read_text()), str(path))


def test_the_locked_student_has_its_parameters() -> None:
    counts = parameter_counts(load_config(KDConfig, BASE).student)
    assert counts == {
        "routed_experts": 5_324_898_304,
        "embedding": 205_914_112,
        "lm_head": 205_914_112,
        "local_attention": 128_440_320,
        "shared_experts": 82_958_848,
        "global_attention": 52_480_000,
        "routers": 20_729_600,
        "dense_mlp": 263_296,
        "norms": 164_864,
        "qk_norms": 20_480,
        "sinks": 640,
        "grape_m": 64,
        "value_residual": 79,
        "total": 6_021_784_719,
        "active": 780_087_951,
        "active_inner": 368_259_727,
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.tpa={q_rank: 4}", "student.tpa.kv_rank"),
        ("student.value_residual.init=1.5", "student.value_residual.init"),
        ("student.hiden=32", "did you mean 'hidden'?"),
        ("optimiser.lr=1", "did you mean 'optimizer'?"),
        ("core_attention=triton", "set it to dense"),
        ("expert_compute=triton", "set it to loop"),
        ("transformer_impl=transformer_engine", "set it to local"),
        ("student.router.groups=3", "experts must be a multiple of router.groups"),
        ("student.layers=5", "layers must be a multiple of global_every"),
        ("batch.micro_batch_size=3", "must be a multiple of batch.micro_batch_size"),
        ("teacher=null", "set loss.kd_weight=0"),
        ("schedule.warmup=120", "schedule.warmup must be below steps"),
        ("loss.temperature=2.0", "1.0"),
    ],
)
def test_what_cannot_run_is_refused(override, said) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(KDConfig, DEMO, (override,))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2},
        {"context": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"tensor": 2, "expert": 2},
        {"sequence_parallel": True},
    ],
)
def test_unsupported_layouts_are_refused(layout) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.\w+.* not supported; "):
        check_layout(ParallelConfig(**layout))


_TENSOR = ("parallel.tensor=2", "parallel.expert=2", "parallel.sequence_parallel=true")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("parallel.pipeline=2",), "student.value_residual"),
        ((*_TENSOR, "parallel.expert=1"), "parallel.expert = 1"),
        (_TENSOR, r"optimizer\.normuon.* not supported; set parallel\.tensor=1"),
        ((*_TENSOR, "student.kv_groups=1"), r"student\.kv_groups=1.*divisor"),
        (("parallel.expert=3",), r"student\.experts=256.*divisor"),
        ((*_TENSOR, "optimizer.normuon=null"), r"compiled with parallel\.tensor=2.*=local"),
    ],
)
def test_parts_of_the_student_are_refused_in_layouts_where_they_do_not_work(
    overrides, said
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_run(load_config(KDConfig, BASE, overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recompute=true", "cuda_graph and recompute exclude each other"),
        ("transformer_impl=local", "cuda_graph needs transformer_impl: compiled"),
        ("expert_compute=loop", "cuda_graph needs transformer_impl: compiled and expert_compute"),
        ("core_attention=dense", "compiled needs core_attention: triton"),
    ],
)
def test_fast_paths_that_do_not_go_together_are_refused(override, said) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(KDConfig, BASE, (override,))


def test_supported_layouts_pass() -> None:
    check_layout(ParallelConfig(expert=8))
    check_layout(ParallelConfig(tensor=2, expert=4, sequence_parallel=True))
    plain = ("transformer_impl=local", "cuda_graph=false", "optimizer.normuon=null")
    check_run(load_config(KDConfig, BASE, (*_TENSOR, *plain)))
