import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_horovod
from build_horovod import cache_key
from console import ToolError

SCRIPT = Path(build_horovod.__file__)
CMAKE_LISTS = """\
# TF SOURCES
list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/mpi_ops.cc")
list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")

# Create library
"""
JS_RUN = "import os\nfrom distutils.spawn import find_executable\nimport sys\n"


CONTROLLER = "void f() {\n  global_ranks_.reserve(size_);\n}\n"


@pytest.fixture
def source(tmp_path):
    """The files that are patched, as they stand in Horovod 0.28.1."""
    files = {
        "horovod/tensorflow/CMakeLists.txt": CMAKE_LISTS,
        "horovod/runner/js_run.py": JS_RUN,
        "horovod/common/gloo/gloo_controller.cc": CONTROLLER,
    }
    for name, text in files.items():
        path = tmp_path / "horovod-0.28.1" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path / "horovod-0.28.1"


@pytest.fixture
def no_tools(tmp_path, monkeypatch):
    """A PATH with nothing on it; returns the folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def add_program(folder, name):
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def add_wheel(cache):
    key = cache_key(
        sys.version_info[:3], build_horovod.tensorflow_version(), build_horovod.platform.machine()
    )
    wheel = cache / key / "horovod-0.28.1-kept.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"wheel")
    return wheel


def test_cache_key_tells_apart_what_needs_another_wheel():
    base = cache_key((3, 11, 7), "2.21.0", "x86_64")
    assert cache_key((3, 11, 9), "2.21.0", "x86_64") == base
    others = {
        cache_key((3, 12, 7), "2.21.0", "x86_64"),
        cache_key((3, 11, 7), "2.21.1", "x86_64"),
        cache_key((3, 11, 7), "2.21.0", "aarch64"),
    }
    assert len(others | {base}) == 4


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFACCEL_CACHE", str(tmp_path))
    assert build_horovod.default_cache() == tmp_path
    monkeypatch.delenv("TFACCEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_horovod.default_cache() == tmp_path / ".cache" / "tfaccel"


def test_patch_takes_out_one_line_and_replaces_the_others(source):
    build_horovod.patch(source)
    assert (source / "horovod/tensorflow/CMakeLists.txt").read_text() == CMAKE_LISTS.replace(
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n', ""
    )
    patched = (source / "horovod/runner/js_run.py").read_text()
    assert patched == "import os\nfrom shutil import which as find_executable\nimport sys\n"
    patched = (source / "horovod/common/gloo/gloo_controller.cc").read_text()
    assert patched == "void f() {\n  global_ranks_.resize(size_);\n}\n"


@pytest.mark.parametrize(("text", "times"), [("# empty\n", 0), (CMAKE_LISTS * 2, 2)])
def test_patch_refuses_other_sources(source, text, times):
    (source / "horovod/tensorflow/CMakeLists.txt").write_text(text)
    with pytest.raises(ToolError, match=rf"stands {times} times .*CMakeLists\.txt") as caught:
        build_horovod.patch(source)
    assert caught.value.exit_code == 4


def test_another_checksum_is_refused_before_anything_is_unpacked(tmp_path):
    wrong = tmp_path / "horovod-0.28.1.tar.gz"
    wrong.write_bytes(b"something else")
    with pytest.raises(ToolError) as caught:
        build_horovod.get_sdist(tmp_path, tmp_path / "log", wrong)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert build_horovod.SDIST_SHA256 in str(caught.value)
    assert caught.value.exit_code == 4
    build_horovod.verify(wrong, hashlib.sha256(b"something else").hexdigest())


def test_absent_source_archive_is_named(tmp_path):
    with pytest.raises(ToolError, match=r"no Horovod source archive at .*absent\.tar\.gz"):
        build_horovod.get_sdist(tmp_path, tmp_path / "log", tmp_path / "absent.tar.gz")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "with another checksum"),
        ("Temporary failure in name resolution", "Is the package index reachable"),
    ],
)
def test_failed_download_is_explained(tmp_path, monkeypatch, output, words):
    def fail(title, command, log, **_):
        log.write_text(output)
        raise build_horovod.CommandError(title, 1, log)

    monkeypatch.setattr(build_horovod.console, "run", fail)
    with pytest.raises(ToolError, match=words) as caught:
        build_horovod.get_sdist(tmp_path, tmp_path / "log", None)
    assert caught.value.exit_code == 4


def test_missing_build_tools_are_all_named(no_tools):
    with pytest.raises(
        ToolError, match=r"lacks: a C\+\+ compiler \(g\+\+\), cmake, make"
    ) as caught:
        build_horovod.check_build_tools()
    assert caught.value.exit_code == 3
    for name in ("c++", "make"):
        add_program(no_tools, name)
    with pytest.raises(ToolError, match=r"lacks: cmake\."):
        build_horovod.check_build_tools()
    add_program(no_tools, "cmake")
    build_horovod.check_build_tools()


def test_chosen_compiler_has_to_be_there(no_tools, monkeypatch):
    for name in ("c++", "cmake", "make"):
        add_program(no_tools, name)
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(ToolError, match=r"a C\+\+ compiler \(\$CXX is my-compiler\)"):
        build_horovod.check_build_tools()


@pytest.mark.usefixtures("no_tools")
def test_kept_wheel_needs_no_compiler(tmp_path):
    wheel = add_wheel(tmp_path / "cache")
    assert build_horovod.build(tmp_path / "cache") == wheel


@pytest.mark.usefixtures("no_tools")
def test_forced_build_does_not_take_the_kept_wheel(tmp_path):
    add_wheel(tmp_path / "cache")
    with pytest.raises(ToolError, match="lacks"):
        build_horovod.build(tmp_path / "cache", force=True)


def make_sdist(source, path):
    with tarfile.open(path, "w:gz") as archive:
        for file in (file for file in source.rglob("*") if file.is_file()):
            data = file.read_bytes()
            member = tarfile.TarInfo(str(file.relative_to(source.parent)))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def known_sdist(source, tmp_path, monkeypatch):
    """A small source archive that passes for the real one; the build tools pass for present."""
    sdist = make_sdist(source, tmp_path / "horovod-0.28.1.tar.gz")
    monkeypatch.setattr(
        build_horovod.verify, "__defaults__", (hashlib.sha256(sdist.read_bytes()).hexdigest(),)
    )
    monkeypatch.setattr(build_horovod, "check_build_tools", lambda: None)
    return sdist


def test_wheel_is_kept_under_its_key_and_nothing_else_stays(known_sdist, tmp_path, monkeypatch):
    def compile_patched(source, work, tensorflow, log):
        assert "xla_mpi_ops" not in (source / "horovod/tensorflow/CMakeLists.txt").read_text()
        wheel = work / f"horovod-0.28.1+tf{tensorflow}-cp3-linux.whl"
        wheel.write_bytes(b"wheel")
        return wheel

    monkeypatch.setattr(build_horovod, "compile_wheel", compile_patched)
    monkeypatch.setattr(build_horovod, "check_wheel", lambda wheel, work, log: None)
    cache = tmp_path / "cache"
    wheel = build_horovod.build(cache, sdist=known_sdist)
    assert wheel.read_bytes() == b"wheel"
    assert sorted(cache.rglob("*")) == [wheel.parent, wheel]
    monkeypatch.setattr(build_horovod, "compile_wheel", None)
    assert build_horovod.build(cache, sdist=known_sdist) == wheel


def test_broken_wheel_is_not_kept(known_sdist, tmp_path, monkeypatch):
    def compile_broken(source, work, tensorflow, log):
        (work / "horovod-broken.whl").write_bytes(b"")
        return work / "horovod-broken.whl"

    monkeypatch.setattr(build_horovod, "compile_wheel", compile_broken)
    cache = tmp_path / "cache"
    with pytest.raises(ToolError, match=r"Unpacking the wheel failed"):
        build_horovod.build(cache, sdist=known_sdist)
    assert [path.suffix for path in cache.iterdir()] == [".log"]


def test_installed_version_is_not_installed_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(build_horovod.console, "run", lambda *args, **_: calls.append(args))
    wheel = tmp_path / "horovod-0.28.1+tf2.21.0-cp311-cp311-linux_x86_64.whl"
    monkeypatch.setattr(build_horovod, "installed_version", lambda _: "0.28.1+tf2.21.0")
    build_horovod.install(wheel)
    assert calls == []
    monkeypatch.setattr(build_horovod, "installed_version", lambda _: "0.28.1+tf2.20.0")
    build_horovod.install(wheel)
    assert [call[0] for call in calls] == ["Installing Horovod"]


def run_script(*arguments, flags=(), **env):
    return subprocess.run(
        [sys.executable, *flags, SCRIPT, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_without_compiler_says_so_in_one_message(tmp_path):
    done = run_script("--cache", tmp_path / "cache", PATH=str(tmp_path), CXX="")
    assert done.returncode == 3
    assert done.stdout == ""
    assert "error: Horovod has to be compiled, and this machine lacks: a C++" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


def test_command_on_a_bare_python_asks_for_tensorflow(tmp_path):
    done = run_script("--cache", tmp_path, flags=["-S"])
    assert done.returncode == 3
    assert "has no TensorFlow. Install it first" in done.stderr
    assert "Traceback" not in done.stderr


def test_command_names_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("c++", "cmake", "make"):
        add_program(tmp_path, name)
    done = run_script(PATH=str(tmp_path), TFACCEL_CACHE=str(tmp_path / "file"))
    assert done.returncode == 3
    assert f"cache folder {tmp_path / 'file'} cannot be written to" in done.stderr


def test_command_prints_only_the_path_of_the_wheel(tmp_path):
    wheel = add_wheel(tmp_path)
    done = run_script(TFACCEL_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{wheel}\n", "")
