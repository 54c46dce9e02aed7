# Sourced by the other scripts: makes .venv, installs into it once, and activates it.
# A second call installs nothing: .venv/.installed holds a hash of the files that decide what is installed.

started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    echo "error: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    python=$(find_python) || fail "no Python 3.11 or 3.12 found. Install one, or name it: PYTHON=/path/to/python3.12 $0"
    if ! "$python" -m venv .venv 2>/dev/null; then
        rm -rf .venv # without ensurepip it is left with a Python and no pip, and would be taken for a whole one next time
        fail "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
    fi
}

check_compiler() { # DeepSpeed compiles two small operators on first use
    command -v "${CXX:-c++}" >/dev/null || fail "g++ is missing: DeepSpeed compiles its CPU operators on first use. On Debian and Ubuntu: apt install g++"
    local header
    header=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
    [ -e "$header" ] || fail "$header is missing: DeepSpeed's operators need the Python headers. On Debian and Ubuntu: apt install python3-dev"
}

wanted=$(cat pyproject.toml constraints.txt | cksum)
[ -x .venv/bin/python ] || make_venv
check_compiler
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv (once, some minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' || fail "pip could not install trainkit"
    echo "$wanted" >.venv/.installed
fi
. .venv/bin/activate
