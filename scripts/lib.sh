# Shared by the scripts in this folder: sourced, not run.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
LOG_DIR=$ROOT/build/log
VENV=$ROOT/.venv
# The demo and the tests use Debian's PostgreSQL 15, unless PG_CONFIG says otherwise.
export PG_CONFIG=${PG_CONFIG:-/usr/lib/postgresql/15/bin/pg_config}
PYTHON=${PYTHON:-python3}
# The private servers live in the checkout, or in /var/tmp where their user cannot work there; with
# SPECTRUM_IN_MEMORY=yes in memory, if it has room.
INSIDE=$ROOT/.cluster
OUTSIDE=/var/tmp/spectrum-$(id -u)-$(printf '%s' "$ROOT" | sha256sum | cut -c1-8)
MEMORY=/dev/shm/${OUTSIDE##*/}

say() { printf '== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
die() {
    printf 'spectrum: %s\n' "$*" >&2
    exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# A server does not run as root: root hands it to the user postgres.
as_server() {
    if is_root; then (cd / && runuser -u postgres -- "$@"); else "$@"; fi
}

# is_ours DIR: a directory, and nobody else's (in /var/tmp anyone may come first)
is_ours() { [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ]; }

# own_dir DIR: is there, and is ours
own_dir() {
    [ -e "$1" ] || mkdir -m 755 "$1" 2>/dev/null
    is_ours "$1"
}

# in_memory: is asked for, and 4 GB there leave as much to the rest
in_memory() {
    [ "${SPECTRUM_IN_MEMORY:-no}" = yes ] && [ -w /dev/shm ] &&
        [ "$(df --output=avail -B 1M /dev/shm | tail -n 1)" -ge 4096 ] &&
        [ "$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)" -ge 8192 ]
}

# default_version: the major version of PG_CONFIG's PostgreSQL, or of what will be installed
default_version() {
    { "$PG_CONFIG" --version 2>/dev/null || echo 15; } | sed -E 's/^[^0-9]*([0-9]+).*/\1/'
}

# server_home VERSION: where the server of that major version is; nothing if it is not here
server_home() {
    local base
    if [ "$1" = "$(default_version)" ]; then
        dirname "$("$PG_CONFIG" --bindir)"
        return
    fi
    for base in "$INSIDE" "$OUTSIDE"; do
        if is_ours "$base" && is_ours "$base/.postgres-$1"; then
            printf '%s' "$base/.postgres-$1"
            return
        fi
    done
}

# server_share VERSION: that server's directory of extensions and other files
server_share() {
    if [ "$1" = "$(default_version)" ]; then
        "$PG_CONFIG" --sharedir
    else
        printf '%s/share/postgresql' "$(server_home "$1")"
    fi
}

# as_root COMMAND...: through sudo, for an ordinary user
as_root() {
    if is_root; then
        "$@"
        return
    fi
    command -v sudo >/dev/null || die "this needs root, and there is no sudo here: $*"
    sudo "$@"
}

# Ask for the password now, while nothing else writes to the terminal.
ready_root() {
    is_root || sudo -n true 2>/dev/null || as_root -v || die "sudo refused: run this as root"
}

# quietly LABEL COMMAND...: one line while it works, the end of its log if it fails
quietly() {
    local label=$1 log begun=$SECONDS
    shift
    mkdir -p "$LOG_DIR" || die "cannot write to $ROOT"
    log=$LOG_DIR/$(printf '%s' "$label" | tr -cs 'a-zA-Z0-9' '-').log
    printf '   %s ... ' "$label"
    if "$@" >"$log" 2>&1 </dev/null; then
        printf 'done (%d s)\n' $((SECONDS - begun))
    else
        printf 'failed; the end of %s:\n' "$log"
        tail -n 30 "$log"
        exit 1
    fi
}

build_and_install() {
    quietly "building the extension" make -C "$ROOT" all
    "$ROOT/scripts/install-extension"
}
