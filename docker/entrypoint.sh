#!/usr/bin/env bash
# The one entry point of both images: `vpmoe-data ...` or `vpmoe-train ...`.
# VPMOE_GPUS=N (N > 1) starts vpmoe-train as N processes under torchrun, one a GPU.
set -euo pipefail

case ${1:-} in
vpmoe-data)
    exec "$@"
    ;;
vpmoe-train)
    if [[ ${VPMOE_GPUS:-1} -gt 1 ]]; then
        exec torchrun --standalone --nproc-per-node "$VPMOE_GPUS" --no-python "$@"
    fi
    exec "$@"
    ;;
*)
    echo "entrypoint: got '${1:-}', expected 'vpmoe-data ...' or 'vpmoe-train ...'" >&2
    exit 2
    ;;
esac
