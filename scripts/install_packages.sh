#!/usr/bin/env bash
# Installs Debian packages that tests need, where root and apt are to be had.
#
#   scripts/install_packages.sh debootstrap iproute2
#
# Exit 0: they are there; 1: they are not, and the last line says why.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

fail() {
    echo "install_packages: $*" >&2
    exit 1
}

missing=()
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || fail "${missing[*]}: this is no Debian; install them yourself"
[ "$(id -u)" = 0 ] || fail "${missing[*]}: installing takes root"
apt-get update -qq || fail "apt-get update failed"
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}" >/dev/null ||
    fail "${missing[*]}: apt-get could not install them"
echo "install_packages: installed ${missing[*]}"
