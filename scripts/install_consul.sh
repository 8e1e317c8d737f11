#!/usr/bin/env bash
# Installs the `consul` package on Debian or Ubuntu, for the tests that need a real server.
#
#   scripts/install_consul.sh      exit 0: `consul` is there; 1: it is not, and the last line says why
#
# Debian 11 is the last release with the package. On later ones it is taken from Debian 11's suite
# through a *private* apt state (sources, pins and lists in a temporary folder), derived from this
# machine's own sources. The machine's own sources are never touched, so a foreign suite cannot stay
# active, whatever stops this script. Nothing but consul may come from that suite, and nothing that is
# installed may change: otherwise the script refuses.
set -euo pipefail

readonly SUITE=bullseye
readonly WAIT=(-o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0)
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

fail() {
    echo "install_consul: $*" >&2
    exit 1
}

note() { echo "install_consul: $*"; }

candidate() { # [apt option ...]: the version apt would install, or nothing
    apt-cache "$@" policy consul | sed -n 's/^  Candidate: //p' | grep -vx '(none)' || true
}

# Prints what the machine's sources say of its own release, said of $SUITE instead. Other suites of
# the same stanza (updates, security) are left out: the package is in the main one.
derive_sources() { # codename
    local file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk -v RS= -v ORS='\n\n' -v from="$1" -v to="$SUITE" '
            {
                wanted = 0; enabled = 1; stanza = ""
                count = split($0, lines, "\n")
                for (i = 1; i <= count; i++) {
                    line = lines[i]
                    if (line ~ /^#/) continue
                    if (tolower(line) ~ /^enabled:[ \t]*(no|false|0)/) enabled = 0
                    if (tolower(line) ~ /^types:/) line = "Types: deb"
                    if (tolower(line) ~ /^suites:/) {
                        if ((" " line " ") ~ ("[ \t]" from "[ \t]")) wanted = 1
                        line = "Suites: " to
                    }
                    stanza = stanza (stanza == "" ? "" : "\n") line
                }
                if (wanted && enabled) print stanza
            }' "$file"
    done >"$private/sources.list.d/stoker-$SUITE.sources"
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        sed -nE "s/^(deb[[:space:]]+(\[[^]]*\][[:space:]]+)?[^[:space:]]+[[:space:]]+)$1([[:space:]])/\1$SUITE\3/p" \
            >"$private/sources.list.d/stoker-$SUITE.list"
    [ -s "$private/sources.list.d/stoker-$SUITE.sources" ] ||
        [ -s "$private/sources.list.d/stoker-$SUITE.list" ]
}

make_private_state() {
    mkdir -p "$private"/{sources.list.d,preferences.d,lists/partial}
    chmod 755 "$private" # apt downloads as its own user
    cp -p /etc/apt/sources.list.d/*.{sources,list} "$private/sources.list.d/" 2>/dev/null || true
    cp -p /etc/apt/preferences.d/* "$private/preferences.d/" 2>/dev/null || true
    cat >"$private/preferences.d/stoker-consul" <<PIN
Package: *
Pin: release n=$SUITE
Pin-Priority: -1

Package: consul
Pin: release n=$SUITE
Pin-Priority: 990
PIN
    apt_private=(
        -o "Dir::Etc::SourceParts=$private/sources.list.d"
        -o "Dir::Etc::PreferencesParts=$private/preferences.d"
        -o "Dir::State::Lists=$private/lists"
        -o "Dir::Cache::pkgcache="
        -o "Dir::Cache::srcpkgcache="
        "${WAIT[@]}"
    )
}

# Refuses a plan that changes an installed package, or takes more than consul from consul's suite when
# that suite is not the machine's own.
check_plan() { # own|foreign, apt option ...
    local whose=$1 plan added origin changed
    shift
    plan=$(apt-get "$@" -s install -y --no-install-recommends consul 2>&1) ||
        fail "apt finds no way to install consul here: $(tail -n 3 <<<"$plan")"
    changed=$(grep -E '^Remv |^Inst [^ ]+ \[' <<<"$plan" || true)
    [ -z "$changed" ] || fail "refused, installed packages would change: $changed"
    added=$(grep '^Inst ' <<<"$plan")
    origin=$(sed -nE 's/^Inst consul \([^ ]+ ([^ ]+) .*/\1/p' <<<"$added") # e.g. Debian:11.11/oldoldstable
    [ -n "$origin" ] || fail "refused, apt does not say where consul would come from: $added"
    if [ "$whose" = foreign ] && grep -v '^Inst consul ' <<<"$added" | grep -qF "$origin"; then
        fail "refused, more than consul would come from $SUITE: $added"
    fi
    note "apt would add:"$'\n'"$added"
}

install_from_suite() { # codename
    private=$(mktemp -d)
    trap 'rm -rf "$private"' EXIT
    make_private_state
    derive_sources "$1" || fail "found no apt source of $1 to derive one of $SUITE from"
    note "reading the package lists of $1 and $SUITE into a temporary folder"
    apt-get "${apt_private[@]}" -qq update || note "not every source could be read; going on"
    [ -n "$(candidate "${apt_private[@]}")" ] || fail "neither $1 nor $SUITE offers consul here"
    check_plan foreign "${apt_private[@]}"
    apt-get "${apt_private[@]}" -qq install -y --no-install-recommends consul
}

main() {
    if command -v consul >/dev/null; then
        note "already there: $(consul version | head -n 1)"
        return
    fi
    command -v apt-get >/dev/null || fail "no apt-get here; install Consul another way"
    [ "$(id -u)" = 0 ] || fail "must run as root to install a package (try: sudo $0)"
    if [ -n "$(candidate)" ]; then
        check_plan own "${WAIT[@]}"
        apt-get "${WAIT[@]}" -qq install -y --no-install-recommends consul
    else
        # shellcheck source=/dev/null
        codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
        [ -n "$codename" ] || fail "/etc/os-release names no release"
        install_from_suite "$codename"
    fi
    command -v consul >/dev/null || fail "apt reported success, but there is no consul on PATH"
    note "installed: $(consul version | head -n 1)"
}

main "$@"
