#!/usr/bin/env bash
# Completes a base image: docker/install.sh datastore|trainer. Never replaces a package that the image brings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=docker/versions.env
source docker/versions.env
# Both base images keep their packages in the system's Python.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

require_version() {
    local found
    found=$(python3 -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])")
    [[ $found == "$2" ]] || { echo "install: $1: got $found, expected $2 (docker/versions.env)" >&2; exit 1; }
}

# TransformerEngine ships its core as wheels and its PyTorch part as source: hence the base image with nvcc.
install_engines() {
    python3 -m pip install --no-deps \
        "megatron-core==$MEGATRON_CORE" \
        "transformer-engine==$TRANSFORMER_ENGINE" "transformer-engine-cu13==$TRANSFORMER_ENGINE" \
        "nvdlfw-inspect==$NVDLFW_INSPECT" "nvtx==$NVTX" "importlib-metadata==$IMPORTLIB_METADATA" "zipp==$ZIPP" \
        "onnx==$ONNX" "onnx-ir==$ONNX_IR" "onnxscript==$ONNXSCRIPT" "ml-dtypes==$ML_DTYPES" "pybind11==$PYBIND"
    MAX_JOBS=${MAX_JOBS:-8} NVTE_FRAMEWORK=pytorch \
        python3 -m pip install --no-deps --no-build-isolation "transformer-engine-torch==$TRANSFORMER_ENGINE"
}

# What the image lacks of requirements/host.in, at the versions of host.lock; engines (pinned there with ==) stay out.
install_common() {
    local constraints packages
    constraints=$(mktemp)
    python3 - <<'PYTHON' >"$constraints"
import importlib.metadata
import re
from pathlib import Path


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


present = {normal(d.metadata["Name"]) for d in importlib.metadata.distributions()}
for line in Path("requirements/host.lock").read_text().splitlines():
    if line and not line.startswith("#") and normal(line.split("==")[0]) not in present:
        print(line)
PYTHON
    mapfile -t packages < <(grep -vE '^(#|$)|==' requirements/host.in)
    python3 -m pip install --constraint "$constraints" "${packages[@]}"
    rm "$constraints"
}

case ${1:-} in
datastore)
    install_common
    require_version vllm "$VLLM"
    ;;
trainer)
    require_version torch "$TORCH"
    install_common
    install_engines
    require_version megatron-core "$MEGATRON_CORE"
    require_version torch "$TORCH"
    ;;
*)
    echo "usage: docker/install.sh datastore|trainer" >&2
    exit 2
    ;;
esac
python3 -m pip install --no-deps --no-build-isolation --editable .
