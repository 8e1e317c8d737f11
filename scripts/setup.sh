#!/usr/bin/env bash
# Makes the virtual environment, with exactly the versions of the lock files. Run again, it does only
# what is missing: in a second if nothing is.
#
#   scripts/setup.sh base          what `stoker` itself needs
#   scripts/setup.sh engine        and vLLM: for NVIDIA GPUs where there are some, else the CPU build
#   scripts/setup.sh engine dev    and what the tests and checks need
#
# PYTHON           the interpreter to make it with (default: the first of 3.11 or newer found)
# VENV             where it goes (default: .venv)
# ENGINE           vllm or cpu, instead of looking for a GPU
# TORCH_INDEX_URL  where the CPU build of torch is, if your package index does not have it
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
TORCH_INDEX_URL=${TORCH_INDEX_URL:-}
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTHONHOME

fail() {
    echo "setup: $*" >&2
    exit 1
}

say() { echo "setup: $*"; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() { # prints the interpreter
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Stoker needs Python 3.11 or newer, and there is only $(python3 --version 2>&1 || true);" \
        "install python3.11 with its venv module, or set PYTHON"
}

make_venv() {
    local python
    if [ -x "$VENV/bin/python" ] && new_enough "$VENV/bin/python"; then
        return
    fi
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV" ||
        fail "$python can't make a virtual environment; on Debian, install python3-venv"
}

pip_install() { "$VENV/bin/python" -m pip install -qq --no-deps "$@"; }

install_torch_cpu() { # the CPU build, from the configured index or from torch's own
    local torch
    torch=$(grep '^torch==' requirements/cpu.txt)
    if pip_install "$torch" 2>/dev/null; then
        return
    fi
    [ -n "$TORCH_INDEX_URL" ] ||
        fail "the configured package index has no $torch, torch's CPU build; set TORCH_INDEX_URL to" \
            "PyTorch's own index of CPU builds (its installation page names it) and run this again"
    pip_install --extra-index-url "$TORCH_INDEX_URL" "$torch" ||
        fail "$torch can't be installed from TORCH_INDEX_URL=$TORCH_INDEX_URL"
}

install() { # base | cpu | vllm | dev
    say "installing requirements/$1.txt"
    case $1 in
    base) pip_install -r requirements/base.txt && pip_install -e . ;;
    cpu) install_torch_cpu && pip_install -r requirements/cpu.txt ;;
    *) pip_install -r "requirements/$1.txt" ;;
    esac
}

stamp_of() { # base | cpu | vllm | dev: prints what a finished install of it is known by
    local files=("requirements/$1.txt")
    [ "$1" != base ] || files+=(pyproject.toml)
    { echo "$PWD"; cat "${files[@]}"; } | sha256sum | cut -d ' ' -f 1
}

ensure() { # base | cpu | vllm | dev
    local stamp="$VENV/.stoker-$1" wanted
    wanted=$(stamp_of "$1")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    install "$1"
    echo "$wanted" >"$stamp"
    changed=1
}

engine() { # vllm or cpu
    if [ -n "${ENGINE:-}" ]; then
        echo "$ENGINE"
    elif [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then
        echo vllm
    else
        echo cpu
    fi
}

[ $# -gt 0 ] || set -- engine
changed=0
make_venv
ensure base
for what in "$@"; do
    case $what in
    base) ;;
    engine)
        kind=$(engine)
        case $kind in
        cpu | vllm) ensure "$kind" ;;
        *) fail "ENGINE=$kind is neither vllm nor cpu" ;;
        esac
        ;;
    dev) ensure dev ;;
    *) fail "unknown part $what; choose base, engine or dev" ;;
    esac
done
if [ "$changed" = 1 ]; then
    say "ready: $VENV/bin/stoker"
fi
