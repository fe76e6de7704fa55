# shellcheck shell=bash
# Common to the scripts beside this file; sourced, never run.

lsd_scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lsd_root=$(dirname "$lsd_scripts")
# Kernels are kept outside the clone, so that a fresh clone reuses them.
lsd_cache=${LSD_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/lsd}

lsd_me=scripts/$(basename "$0")

say() { printf '%s: %s\n' "$lsd_me" "$*" >&2; }
die() { printf '%s: %s\n' "$lsd_me" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# usage_from FILE: prints the comment block at the head of a script.
usage_from() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$1"; }

# abspath PATH: absolute, whether it exists or not.
abspath() { realpath -m -- "$1"; }

need_root() { [ "$(id -u)" = 0 ] || die "must run as root"; }

# is_uint WORD
is_uint() { [[ $1 =~ ^[0-9]+$ ]]; }

# port_busy PORT: something listens on this TCP port of the loopback.
port_busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
