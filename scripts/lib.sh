# Shared by the scripts in this folder: sourced, not run.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
LOG_DIR=$ROOT/build/log
VENV=$ROOT/.venv
# The demo and the tests use Debian's PostgreSQL 15, unless PG_CONFIG says otherwise.
export PG_CONFIG=${PG_CONFIG:-/usr/lib/postgresql/15/bin/pg_config}
PYTHON=${PYTHON:-python3}

say() { printf '== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
die() {
    printf 'spectrum: %s\n' "$*" >&2
    exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }

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
