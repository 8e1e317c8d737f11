#!/usr/bin/env bash
# Makes the virtual environment, with exactly the versions of the lock files. Run again, it does only
# what is missing: in a second if nothing is.
#
#   scripts/setup.sh base          what `stoker` itself needs
#   scripts/setup.sh engine        and vLLM: for NVIDIA GPUs where there are some, else the CPU build
#   scripts/setup.sh engine dev    and what the tests and checks need
#   scripts/setup.sh outside       and, in $VENV-outside, the clients that tests/outside tries
#
# PYTHON           the interpreter to make it with (default: the first of 3.11 or newer found)
# VENV             where it goes (default: .venv)
# ENGINE           vllm or cpu, instead of looking for a GPU
# TORCH_INDEX_URL  where the CPU build of torch is, if your package index does not have it
#                  (default: PyTorch's public index of CPU builds)
#
# Packages are installed by the hashes in requirements/, whatever index they come from; torch's CPU
# build alone has none there, since PyTorch builds it again for its own index.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
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

# The CPU build of torch where an index has it, else the one for NVIDIA GPUs, which runs on a CPU too.
install_torch() {
    local torch index=${TORCH_INDEX_URL:-$PYTORCH_CPU_INDEX}
    torch=$(grep '^torch==' requirements/torch-cpu.txt)
    if pip_install "$torch" 2>/dev/null; then
        return
    fi
    say "your package index has no $torch; trying $index"
    # A host that drops packets must not cost more than seconds.
    if pip_install --timeout 15 --retries 1 --index-url "$index" "$torch" 2>/dev/null; then
        return
    fi
    [ -z "$TORCH_INDEX_URL" ] || fail "$torch can't be installed from TORCH_INDEX_URL=$TORCH_INDEX_URL"
    say "$index has none either, or can't be reached: installing torch as it is for NVIDIA GPUs, about 3 GB"
    pip_install -r requirements/torch-cuda.txt ||
        fail "torch can't be installed: neither $torch, from your package index or $index, nor" \
            "requirements/torch-cuda.txt; set TORCH_INDEX_URL to an index that has $torch"
}

cuda_of_torch() { # prints the CUDA version that the installed torch was built for, or nothing
    "$VENV/bin/python" - <<'PY'
import importlib.util, pathlib, runpy
found = importlib.util.find_spec("torch")  # importing it would take seconds
if found is not None and found.origin is not None:
    print(runpy.run_path(str(pathlib.Path(found.origin).with_name("version.py"))).get("cuda") or "")
PY
}

refuse_torch_without_cuda() {
    [ -n "$(cuda_of_torch)" ] ||
        fail "torch $("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')" \
            "in $VENV was built without CUDA, and vLLM can't use an NVIDIA GPU with it: remove $VENV," \
            "take CPU builds out of your package sources (see \`pip config list\`), and run this again;" \
            "or set ENGINE=cpu to leave the GPU alone"
}

install() { # base | cpu | vllm | dev
    say "installing requirements/$1.txt"
    case $1 in
    base)
        pip_install -r requirements/base.txt -r requirements/build.txt
        pip_install --no-build-isolation -e .
        ;;
    cpu) pip_install -r requirements/cpu.txt && install_torch ;;
    vllm) pip_install -r requirements/vllm.txt && refuse_torch_without_cuda ;;
    *) pip_install -r "requirements/$1.txt" ;;
    esac
}

stamp_of() { # base | cpu | vllm | dev: prints what a finished install of it is known by
    local files=("requirements/$1.txt")
    [ "$1" != base ] || files+=(requirements/build.txt pyproject.toml)
    [ "$1" != cpu ] || files+=(requirements/torch-{cpu,cuda}.txt)
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

outside() { # the clients, whose packages agree with nobody else's
    local wanted clients=tests/outside/clients
    wanted=$({ echo "$PWD"; cat requirements/outside.txt "$clients/package-lock.json"; } | sha256sum)
    if [ "$(cat "$VENV-outside/.stoker" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "installing requirements/outside.txt into $VENV-outside"
    "$(find_python)" -m venv "$VENV-outside"
    "$VENV-outside/bin/python" -m pip install -qq --no-deps -r requirements/outside.txt
    mkdir -p "$VENV-outside/node"
    cp "$clients/package.json" "$clients/package-lock.json" "$VENV-outside/node/"
    if ! command -v npm >/dev/null; then
        say "there is no npm: the Node clients will be skipped; install nodejs and npm, and run this again"
        return
    fi
    (cd "$VENV-outside/node" && npm ci --no-audit --no-fund --silent)
    echo "$wanted" >"$VENV-outside/.stoker"
}

numa() { # vLLM's CPU build is linked against it; minimal hosts have none
    "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null && return
    scripts/install_packages.sh libnuma1 ||
        say "vLLM's CPU build will not start without libnuma.so.1 (on Debian: apt-get install libnuma1)"
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
        cpu) ensure cpu && numa ;;
        vllm) ensure vllm ;;
        *) fail "ENGINE=$kind is neither vllm nor cpu" ;;
        esac
        ;;
    dev) ensure dev ;;
    outside) outside ;;
    *) fail "unknown part $what; choose base, engine, dev or outside" ;;
    esac
done
if [ "$changed" = 1 ]; then
    say "ready: $VENV/bin/stoker"
fi
