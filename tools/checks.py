"""Every check of the project, in the environment that runs this: lint, types, floors, tests.

tools/test calls it. With --exhaustive no case of a test is left out;
with other arguments only pytest runs, with these arguments.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import console
from console import Step

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

QUIET_CHECKS = {
    "ruff check": ["ruff", "check", "--quiet", "."],
    "ruff format": ["ruff", "format", "--check", "--quiet", "."],
    "mypy": ["mypy"],
    "import-linter": ["lint-imports"],
}
# Two processes: more would only share the cores that TensorFlow's threads are on already. The tests
# of a file share costly fixtures. (Groups by marker go unseen: xdist 3.8 with pytest 9.2.)
# The order is that of tests/conftest.py.
WHOLE_SUITE = ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]
EXHAUSTIVE = "--exhaustive"  # tests/conftest.py
JAX_TESTS = "tests/core/test_jax_backend.py"


def main() -> int:
    """Runs everything, even after a failure, and says at the end what failed."""
    given = sys.argv[1:]
    if given and given != [EXHAUSTIVE]:
        return pytest(given)
    outcomes = {title: run_quietly(title, command) for title, command in QUIET_CHECKS.items()}
    outcomes["pytest on JAX"] = pytest([JAX_TESTS], KERAS_BACKEND="jax") == 0
    outcomes["pytest"] = pytest([*WHOLE_SUITE, *given]) == 0
    failed = [title for title, passed in outcomes.items() if not passed]
    print(f"\nFailed: {', '.join(failed)}" if failed else "\nAll checks passed.", flush=True)
    return 1 if failed else 0


def run_quietly(title: str, command: Sequence[str]) -> bool:
    """Runs a check that has something to say only when it fails."""
    step = Step(title)
    done = subprocess.run(
        [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    step.end("failed" if done.returncode else "passed")
    if done.returncode:
        print(done.stdout + done.stderr, flush=True)
    return done.returncode == 0


def pytest(arguments: Sequence[str], **env: str) -> int:
    """Runs pytest with its output on the terminal."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, check=False).returncode


if __name__ == "__main__":
    sys.exit(console.main_guard(main))
