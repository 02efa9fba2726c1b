"""The teacher's config, where its weights lie and what identifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from common.config import Config
from common.errors import ConfigError
from common.files import sha256_file
from datastore.budget import BudgetLimits
from datastore.harmony import RenderConfig
from datastore.target import MAX_THRESHOLD, MIN_THRESHOLD


class SystemText(Config):
    """What the teacher reads instead of the dataset's own system text; null keeps the dataset's."""

    identity: str | None = None
    reasoning: Literal["low", "medium", "high"] | None = None

    def applied_to(self, render: RenderConfig) -> RenderConfig:
        """The render config whose constant prefix the teacher is shown."""
        return render.model_copy(update=self.model_dump(exclude_none=True))


class EngineConfig(Config):
    """How vLLM runs the teacher.

    gpu_memory_utilization (cuda) and kv_cache_gib (cpu) bound its memory. vocab_chunk_tokens: positions whose logits
    exist at a time (201,088 * 4 bytes each, twice). documents_per_call: documents handed to the engine together,
    which are in memory at a time. load_format `dummy` takes random weights of the config's shape, for benchmarks.
    """

    device: Literal["cpu", "cuda"]
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    max_num_seqs: int = Field(ge=1)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    kv_cache_gib: int | None = Field(default=None, ge=1)
    attention_backend: str | None = None
    moe_backend: str | None = None
    enforce_eager: bool
    load_format: Literal["auto", "dummy"] = "auto"
    vocab_chunk_tokens: int = Field(ge=1)
    documents_per_call: int = Field(ge=1)

    @model_validator(mode="after")
    def _memory_fits_device(self) -> EngineConfig:
        needed, other = ("kv_cache_gib", "gpu_memory_utilization")
        if self.device == "cuda":
            needed, other = other, needed
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"device {self.device} takes engine.{needed} and no engine.{other}")
        return self


class TeacherConfig(Config):
    """A teacher. name: the folder of its targets. model: a local folder (revision null) or a hub id with the
    commit to take as revision.

    threshold: ids of at least this probability are stored exactly (docs/format.md). The lm_head is always fp32.
    limits: what every shard must keep (datastore/budget.py). canary: the file with the reference values of this
    teacher (datastore/canary.py); null: canary.json in its local model folder.
    """

    name: str
    model: str
    revision: str | None = Field(default=None, pattern="^[0-9a-f]{40}$")
    dtype: Literal["float32", "bfloat16"]
    threshold: float = Field(ge=MIN_THRESHOLD, le=MAX_THRESHOLD)
    temperature: Literal[1.0] = 1.0
    system: SystemText | None = None
    limits: BudgetLimits = BudgetLimits()
    canary: str | None = None
    engine: EngineConfig

    @model_validator(mode="after")
    def _cpu_is_float32(self) -> TeacherConfig:
        if self.engine.device == "cpu" and self.dtype != "float32":
            raise ValueError("device cpu takes dtype float32")
        return self

    def shaping(self) -> dict[str, Any]:
        """The keys on which the targets depend; `weights_identity` says which model, batch sizes do not count."""
        engine = self.engine.resolved()
        kept = ("device", "tensor_parallel_size", "attention_backend", "moe_backend", "load_format")
        return {
            "dtype": self.dtype,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "system": self.system and self.system.resolved(),
            "engine": {key: engine[key] for key in kept},
        }


def local_model(teacher: TeacherConfig) -> Path:
    """The folder with config.json and weights; a hub model is downloaded once to the hub cache.

    Raises ConfigError when a local folder is absent, or is a hub id without a revision.
    """
    if teacher.revision is None:
        folder = Path(teacher.model)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"teacher {teacher.name}: model {teacher.model} is no local model folder",
                expected="a folder with config.json, or a hub id with `revision`",
                remedy="make it (python -m demo.tiny_teacher), or pin `revision` to a commit",
            )
        return folder.resolve()
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            teacher.model,
            revision=teacher.revision,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["original/*", "metal/*"],
        )
    )


def weights_identity(teacher: TeacherConfig, folder: Path) -> dict[str, Any]:
    """Hash of config.json, and size and hash of each weight file (none with random weights). Reads them all."""
    files = sorted(folder.glob("*.safetensors")) if teacher.engine.load_format == "auto" else []
    return {
        "config_sha256": sha256_file(folder / "config.json"),
        "weights": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        ],
    }
