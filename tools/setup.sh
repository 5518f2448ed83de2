# Sourced by the other tools: finds or installs uv and the few system libraries, then prepares the environment.
# Needs Python 3.11 or newer with pip, nothing else.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset VIRTUAL_ENV  # of the shell that calls: uv would warn of it at every step

if command -v uv >/dev/null 2>&1; then
    uv=(uv)
elif python3 -m uv --version >/dev/null 2>&1; then
    uv=(python3 -m uv)
else
    echo "uv is not installed: installing it with pip" >&2
    # A Python that belongs to the operating system refuses pip; there a private environment serves.
    if python3 -m pip install --quiet uv 2>/dev/null; then
        uv=(python3 -m uv)
    else
        python3 -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv || {
            echo "error: uv could not be installed; install it by hand (pip install uv) and run this again" >&2
            exit 1
        }
        uv=(.venv-uv/bin/uv)
    fi
fi

# require_program PROGRAM PACKAGE...: a program of the system, through apt when we may, else a line that names it.
require_program() {
    local program=$1
    shift
    command -v "$program" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "$program is not installed: installing $* with apt-get" >&2
        DEBIAN_FRONTEND=noninteractive sh -c 'apt-get update -qq && apt-get install -qq -y "$@"' sh "$@" >/dev/null
    else
        echo "error: $program is needed; install it with your system's package manager (Debian: apt-get install $*)" >&2
        exit 1
    fi
}
