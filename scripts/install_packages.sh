#!/usr/bin/env bash
# Installs Debian packages that tests need, where root and apt are to be had. No service that they
# bring is started, now or at the next boot: nginx would take port 80.
#
#   scripts/install_packages.sh debootstrap iproute2
#
# Exit 0: they are there; 1: they are not, and the last line says why.
set -euo pipefail
POLICY=/usr/sbin/policy-rc.d
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

fail() {
    echo "install_packages: $*" >&2
    exit 1
}

enabled() { # prints the services that start with this host
    find /etc/systemd/system -path '*.wants/*.service' -printf '%f\n' 2>/dev/null | sort -u
}

missing=()
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || fail "${missing[*]}: this is no Debian; install them yourself"
[ "$(id -u)" = 0 ] || fail "${missing[*]}: installing takes root"
apt-get update -qq || fail "apt-get update failed"
before=$(enabled)
if [ ! -e "$POLICY" ]; then # what asks whether a package may start its service
    trap 'rm -f "$POLICY"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
fi
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}" >/dev/null ||
    fail "${missing[*]}: apt-get could not install them"
comm -13 <(echo "$before") <(enabled) | while read -r service; do
    update-rc.d "${service%.service}" disable
done
echo "install_packages: installed ${missing[*]}"
