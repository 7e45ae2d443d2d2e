# Sourced by quickstart and test: sets $python to the Python that .venv is, or will be, made of.
# $PYTHON if set, else the .venv that exists, else the newest supported one that is found.

supported='3.13 3.12 3.11 3.10'

# Is $1 a supported Python that can make virtual environments? Sets $why if it is not.
usable() {
    command -v "$1" >/dev/null 2>&1 || { why='not found'; return 1; }
    why=$("$1" -c '
import sys
version = ".".join(map(str, sys.version_info[:2]))
if version not in sys.argv[1].split():
    sys.exit(print(f"is Python {version}; supported are {sys.argv[1]}") or 1)
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(print(f"is Python {version} without {error.name}; on Debian or Ubuntu: "
                   f"apt-get install python{version}-venv") or 1)
' "$supported" 2>/dev/null)
}

python=
if [ -n "${PYTHON:-}" ]; then
    if usable "$PYTHON"; then
        python=$PYTHON
    else
        echo "error: PYTHON=$PYTHON ${why:-does not run}." >&2
        exit 3
    fi
elif usable .venv/bin/python && .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=.venv/bin/python
else
    tried=
    for version in $supported; do
        if usable "python$version"; then python=python$version; break; fi
        [ "$why" = 'not found' ] || [ -z "$why" ] || tried="$tried
  python$version $why"
    done
    if [ -z "$python" ]; then
        for name in python3 python; do
            if usable "$name"; then python=$name; break; fi
            [ "$why" = 'not found' ] || [ -z "$why" ] || tried="$tried
  $name $why"
        done
    fi
    if [ -z "$python" ]; then
        echo "error: tfaccel needs Python ($supported) with its venv module; none was found.$tried
Install one (Debian or Ubuntu: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python $0" >&2
        exit 3
    fi
fi
