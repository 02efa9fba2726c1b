#!/usr/bin/env bash
# Makes the virtual environment of the CPU host path: Python 3.11 or 3.12, torch (CPU build), the locked packages, this project.
# A second run installs nothing; an interrupted run starts over. VPMOE_VENV names another folder than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0
TORCH_INDEX=https://download.pytorch.org/whl/cpu
VENV=${VPMOE_VENV:-.venv}
STAMP=$VENV/.setup-stamp
UNFINISHED=$VENV/.setup-unfinished

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }
say() { printf 'setup: %s\n' "$@"; }

inputs_hash() { cat requirements/host.lock pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1; }

# A name on PATH may be a shim that does not run, or a Python without venv: so each candidate is tried, not just looked up.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no usable Python: tried python3.11, python3.12, python3; expected version 3.11 or 3.12 with the venv module" \
        "install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv) and run the same command again"
}

install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check -qq --no-deps "$@"
}

# A CPU wheel named by PIP_FIND_LINKS or pip's own config comes first; otherwise PyTorch's CPU index.
install_torch() {
    install --no-index "torch==$TORCH" 2>/dev/null ||
        install --index-url "$TORCH_INDEX" "torch==$TORCH" ||
        fail "torch $TORCH (CPU) was found neither among pip's find-links nor at $TORCH_INDEX" \
            "check the network, or point PIP_FIND_LINKS at a folder with the wheel"
}

require_cpu_torch() {
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' ||
        fail "torch $TORCH in $VENV is no CPU build; delete $VENV and correct pip's find-links"
}

exec 9<scripts/setup.sh && flock 9 # two runs at once wait for each other
wanted=$(inputs_hash)
if [[ -f $STAMP && ! -e $UNFINISHED && $(<"$STAMP") == "$wanted" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

[[ -e $UNFINISHED ]] && say "an earlier run was interrupted: starting over" && rm -rf "$VENV"
if ! "$VENV/bin/python" -c '' 2>/dev/null; then
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    rm -rf "$VENV" && mkdir -p "$VENV" && touch "$UNFINISHED"
    "$python" -m venv "$VENV" || fail "$python could not make $VENV"
fi
touch "$UNFINISHED"
say "installing torch $TORCH (CPU)"
install_torch
say "installing the locked packages (a minute or two)"
install -r requirements/host.lock ||
    fail "requirements/host.lock could not be installed" \
        "check that pip reaches a package index (PIP_INDEX_URL, or pip config), then run the same command again"
require_cpu_torch
install --no-build-isolation -e . || fail "this project could not be installed into $VENV"
echo "$wanted" >"$STAMP"
rm "$UNFINISHED"
say "done: $VENV"
