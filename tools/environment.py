"""Makes .venv in the checkout and installs tfaccel in it, editable, with Horovod where it compiles.

tools/quickstart and tools/test call it first. Standard library only. What was installed is noted in
.venv/tfaccel-installed.json; while that is up to date, a second run has nothing to do.
"""

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path

import console
from console import CommandError, ToolError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
EXTRAS = "dev,distributed"
MISSING = 3

STAMP = ENVIRONMENT / "tfaccel-installed.json"
_NETWORK_SIGNS = (
    "No matching distribution found for setuptools",
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "Temporary failure in name resolution",
    "ProxyError",
    "Network is unreachable",
)


def main() -> int:
    """Brings .venv up to date; a missing compiler is reported and is no error."""
    make_environment()
    stamp = fingerprint()
    if read_stamp() != stamp:
        STAMP.unlink(missing_ok=True)
        install_packages()
        STAMP.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    install_horovod()
    return 0


def make_environment() -> None:
    """Makes .venv with the Python that runs this, unless it is there with the same version."""
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = environment_version()
    if found == wanted:
        return
    state = f"Replacing .venv (Python {found})" if found else "Making .venv"
    step = console.Step(f"{state} with Python {wanted}")
    try:
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        step.end("failed")
        raise ToolError(
            f"{ENVIRONMENT} could not be made: {error}. Is there room on the disk, and is the "
            f"venv module whole? (Debian or Ubuntu: apt-get install python{wanted}-venv)",
            MISSING,
        ) from error
    step.end()


def environment_version() -> str | None:
    """The Python version of .venv, as in "3.11", or None if there is no working one with pip."""
    probe = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def fingerprint() -> dict[str, str]:
    """All that decides what gets installed."""
    files = {
        name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        for name in ("setup.cfg", "pyproject.toml")
    }
    return {**files, "extras": EXTRAS, "folder": str(ROOT), "python": sys.version.split()[0]}


def read_stamp() -> dict[str, str] | None:
    """What the last complete installation noted, or None."""
    try:
        noted = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return noted if isinstance(noted, dict) else None


def install_packages() -> None:
    """Installs tfaccel, editable, with what it needs to be used and tested."""
    try:
        console.run(
            "Installing tfaccel and its packages",
            [PYTHON, "-m", "pip", "install", "--editable", f".[{EXTRAS}]"],
            ENVIRONMENT / "tfaccel-install.log",
            cwd=ROOT,
        )
    except CommandError as error:
        if any(sign in error.output for sign in _NETWORK_SIGNS):
            raise ToolError(
                "The package index cannot be reached. Connect to the network, or tell pip of "
                f"another index or proxy (PIP_INDEX_URL, HTTPS_PROXY), and try again. {error}",
                MISSING,
            ) from error
        raise


def install_horovod() -> None:
    """Installs the patched Horovod; says what is missing where it cannot be built, and goes on."""
    command = [str(PYTHON), str(ROOT / "tools" / "build_horovod.py"), "--install"]
    built = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if built.returncode == console.INTERRUPTED:
        raise KeyboardInterrupt
    if built.returncode:
        sys.stderr.write(
            "Going on without Horovod: training on several workers is off, and the tests of it "
            "are skipped. All else works.\n\n"
        )


if __name__ == "__main__":
    sys.exit(console.main_guard(main))
