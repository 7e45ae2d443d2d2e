#!/usr/bin/env python3
"""Builds a Horovod wheel that works with the TensorFlow installed beside this Python, once.

Horovod 0.28.1, the last release, does not compile against TensorFlow 2.21 as it is: one source
file (`xla_mpi_ops.cc`, XLA on GPUs) needs a header that the TensorFlow wheel does not ship, its
launcher imports `distutils`, which Python 3.12 has no more, and its check for stalled workers does
nothing under Gloo. The three lines are changed, and the wheel is kept in a cache folder by Python
version, TensorFlow version and architecture.

Run it with the Python that Horovod is wanted for; it needs TensorFlow there, a C++ compiler, cmake
and make. The path of the wheel is the only thing written on standard output:

    .venv/bin/python tools/build_horovod.py            # build, or find in the cache
    .venv/bin/python tools/build_horovod.py --install  # and install it

Exit codes: 0 done, 1 the build failed, 2 wrong usage, 3 something is missing on this machine,
4 Horovod's sources could not be had or are not the ones expected.
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import console
from console import CommandError, ToolError

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECIPE = 2  # Part of the cache key: raise it when what is built changes.

BUILD_FAILED, MISSING, BAD_SOURCES = 1, 3, 4

_BUILD_TOOLS = ("setuptools>=77,<84", "wheel", "packaging")
_RUNTIME = ("cloudpickle", "psutil", "pyyaml", "packaging")
_COMPILERS = ("c++", "g++", "clang++")

# file inside the sdist -> (the one line that is replaced, what stands there instead)
PATCHES = {
    "horovod/tensorflow/CMakeLists.txt": (
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")',
        "",
    ),
    # Reserved but never filled, so that under Gloo a stalled worker is never noticed.
    "horovod/common/gloo/gloo_controller.cc": (
        "global_ranks_.reserve(size_);",
        "  global_ranks_.resize(size_);",
    ),
    "horovod/runner/js_run.py": (
        "from distutils.spawn import find_executable",
        "from shutil import which as find_executable",
    ),
}

_SMOKE_TEST = """
import numpy, horovod.tensorflow as hvd
hvd.init()
assert hvd.size() == 1 and hvd.gloo_enabled()
total = hvd.allreduce(numpy.float32([1, 2]), op=hvd.Sum)
assert total.numpy().tolist() == [1, 2], total
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, builds or finds the wheel and prints its path."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Exit codes: 0 done, 1 build failed, 2 usage, 3 something missing, 4 sources.",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder that keeps the wheel ($TFACCEL_CACHE, else ~/.cache/tfaccel)",
    )
    parser.add_argument("--install", action="store_true", help="install it beside this Python")
    parser.add_argument("--force", action="store_true", help="build even if the cache has it")
    parser.add_argument("--sdist", type=Path, help=f"horovod-{VERSION}.tar.gz, instead of pip's")
    options = parser.parse_args(arguments)

    wheel = build(options.cache, sdist=options.sdist, force=options.force)
    if options.install:
        install(wheel)
    print(wheel)
    return 0


def default_cache() -> Path:
    """$TFACCEL_CACHE, else ~/.cache/tfaccel (or $XDG_CACHE_HOME/tfaccel)."""
    if chosen := os.environ.get("TFACCEL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tfaccel"


def tensorflow_version() -> str:
    """The version of TensorFlow that this Python has.

    Raises:
        ToolError: it has none.
    """
    version = installed_version("tensorflow") or installed_version("tensorflow-cpu")
    if version is None:
        raise ToolError(
            f"Horovod is compiled against TensorFlow, but {sys.executable} has no TensorFlow. "
            "Install it first (pip install tensorflow), or run this with the Python of .venv.",
            MISSING,
        )
    return version


def cache_key(python: Sequence[int], tensorflow: str, machine: str) -> str:
    """The name of the folder that holds the wheel.

    >>> cache_key((3, 11, 7), "2.21.0", "x86_64")
    'horovod-0.28.1-2-cp311-tensorflow2.21.0-x86_64'
    """
    minor = f"cp{python[0]}{python[1]}"
    return f"horovod-{VERSION}-{RECIPE}-{minor}-tensorflow{tensorflow}-{machine}"


def build(cache: Path, *, sdist: Path | None = None, force: bool = False) -> Path:
    """Returns the wheel from the cache, after building it if it is not there.

    Raises:
        ToolError: something is missing, the sources are not the expected ones, or a step failed.
    """
    tensorflow = tensorflow_version()
    cache = cache.expanduser().resolve()
    key = cache_key(sys.version_info[:3], tensorflow, platform.machine())
    home, log = cache / key, cache / f"{key}.log"
    if not force and (kept := find_wheel(home)):
        return kept
    check_build_tools()
    make_folder(cache)
    # In the cache folder, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as name:
        work = Path(name)
        source = unpack(get_sdist(work, log, sdist), work)
        patch(source)
        wheel = compile_wheel(source, work, tensorflow, log)
        check_wheel(wheel, work, log)
        keep(wheel, home)
    kept = find_wheel(home)
    if kept is None:
        raise ToolError(f"The wheel disappeared from {home}.", BUILD_FAILED)
    return kept


def find_wheel(home: Path) -> Path | None:
    """The wheel in a folder of the cache, or None."""
    return next(iter(sorted(home.glob("horovod-*.whl"))), None)


def check_build_tools() -> None:
    """Raises a ToolError that names every missing build tool and how to get it."""
    missing = []
    compiler = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([compiler] if compiler else _COMPILERS)):
        missing.append(f"a C++ compiler ({f'$CXX is {compiler}' if compiler else 'g++'})")
    missing += [program for program in ("cmake", "make") if not shutil.which(program)]
    if missing:
        raise ToolError(
            f"Horovod has to be compiled, and this machine lacks: {', '.join(missing)}. "
            "On Debian or Ubuntu: apt-get install g++ cmake make; on Fedora: dnf install gcc-c++ "
            "cmake make; cmake alone also by pip install cmake.",
            MISSING,
        )


def make_folder(folder: Path) -> None:
    """Makes the cache folder, or says that it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ToolError(
            f"The cache folder {folder} cannot be written to ({error.strerror}). "
            "Set TFACCEL_CACHE to one that can.",
            MISSING,
        ) from error


def get_sdist(work: Path, log: Path, given: Path | None) -> Path:
    """Horovod's source archive, from pip or from `given`, with its checksum verified."""
    if given is None:
        # pip checks the hash before it runs anything that is in the archive.
        wanted = work / "horovod.txt"
        wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        flags = ["--no-deps", "--no-binary=horovod", "--require-hashes", f"--dest={work}"]
        command: console.Command = [sys.executable, "-m", "pip", "download", *flags, "-r", wanted]
        try:
            console.run(f"Fetching Horovod {VERSION}", command, log)
        except CommandError as error:
            raise _download_error(error) from error
        given = work / f"horovod-{VERSION}.tar.gz"
    if not given.is_file():
        raise ToolError(f"There is no Horovod source archive at {given}.", BAD_SOURCES)
    verify(given)
    return given


def verify(sdist: Path, expected: str = SDIST_SHA256) -> None:
    """Raises a ToolError if the archive is not the one that this recipe was tried on."""
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != expected:
        raise ToolError(
            f"{sdist} is not the Horovod {VERSION} that was expected, so it is not built: its "
            f"SHA-256 is {found}, not {expected}. Delete it, empty pip's cache "
            "(pip cache remove horovod) and try again.",
            BAD_SOURCES,
        )


def _download_error(error: CommandError) -> ToolError:
    if "DO NOT MATCH THE HASHES" in error.output:
        return ToolError(
            f"The package index handed out a Horovod {VERSION} with another checksum than "
            f"{SDIST_SHA256}, so it is not built. pip's words are in {error.log}.",
            BAD_SOURCES,
        )
    return ToolError(
        f"Horovod {VERSION} could not be fetched. Is the package index reachable from here? "
        f"(`pip config list` shows which one pip asks.) {error}",
        BAD_SOURCES,
    )


def unpack(sdist: Path, work: Path) -> Path:
    """Unpacks the archive in `work` and returns its folder."""
    with tarfile.open(sdist) as archive:
        # The way that Python's documentation names for releases without the filter argument.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(work)  # noqa: S202 (its checksum is known)
    return work / f"horovod-{VERSION}"


def patch(source: Path) -> None:
    """Replaces the lines of PATCHES, each of which has to be there exactly once."""
    for name, (old, new) in PATCHES.items():
        path = source / name
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if line.strip() == old]
        if len(places) != 1:
            raise ToolError(
                f"The line {old!r} stands {len(places)} times in {name}, not once: these are not "
                f"the sources of Horovod {VERSION}.",
                BAD_SOURCES,
            )
        lines[places[0]] = f"{new}\n" if new else ""
        path.write_text("".join(lines), encoding="utf-8")


def compile_wheel(source: Path, work: Path, tensorflow: str, log: Path) -> Path:
    """Builds the wheel, whose version names TensorFlow and recipe: 0.28.1+tf2.21.0.2."""
    tools = work / "build-tools"
    pip = [sys.executable, "-m", "pip"]
    console.run(
        "Fetching build tools",
        [*pip, "install", "--quiet", "--target", tools, *_BUILD_TOOLS, *_RUNTIME],
        log,
    )
    env = {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_LOCAL_VERSION": f"tf{tensorflow}.{RECIPE}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Without it cmake 4 refuses Gloo's CMakeLists.
        "MAKEFLAGS": f"-j{os.cpu_count() or 1}",
        "PYTHONPATH": str(tools),
    }
    flags = ["--no-build-isolation", "--no-deps", "--no-cache-dir", "--verbose"]
    console.run(
        f"Building Horovod {VERSION} for TensorFlow {tensorflow} (some minutes, once)",
        [*pip, "wheel", *flags, "--wheel-dir", work / "wheel", source],
        log,
        env=env,
    )
    wheel = find_wheel(work / "wheel")
    if wheel is None:
        raise ToolError(f"pip built no wheel and did not say why; see {log}.", BUILD_FAILED)
    return wheel


def check_wheel(wheel: Path, work: Path, log: Path) -> None:
    """Imports the wheel and reduces a tensor with it, so that no broken one is ever kept."""
    tried = work / "tried"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={tried}"]
    env = {"PYTHONPATH": f"{tried}{os.pathsep}{work / 'build-tools'}", "TF_CPP_MIN_LOG_LEVEL": "2"}
    console.run("Unpacking the wheel", [*pip, wheel], log)
    console.run("Trying the wheel", [sys.executable, "-c", _SMOKE_TEST], log, env=env)


def keep(wheel: Path, home: Path) -> None:
    """Moves the wheel to its place in the cache: there whole, or not at all."""
    home.mkdir(parents=True, exist_ok=True)
    wheel.replace(home / wheel.name)


def install(wheel: Path) -> None:
    """Installs the wheel beside this Python, unless that very version is there already."""
    if installed_version("horovod") == wheel.name.split("-")[1].replace("_", "."):
        return
    flags = ["--no-deps", "--force-reinstall", "--quiet"]
    console.run(
        "Installing Horovod",
        [sys.executable, "-m", "pip", "install", *flags, wheel],
        wheel.parent.parent / f"{wheel.parent.name}.log",
    )


def installed_version(package: str) -> str | None:
    """The version of a package that this Python has, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(console.main_guard(main))
