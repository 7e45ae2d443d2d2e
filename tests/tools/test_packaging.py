import configparser
import re
import subprocess
import sys
from pathlib import Path

import environment

ROOT = environment.ROOT
PACKAGE = ROOT / "tfaccel"


def read_setup():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def test_every_file_of_the_package_is_installed():
    patterns = read_setup()["options.package_data"]["*"].split(",")
    rooms = {path.parent for path in PACKAGE.rglob("__init__.py")}
    installed = {
        path for room in rooms for pattern in patterns for path in room.glob(pattern.strip())
    }
    there = {path for path in PACKAGE.rglob("*") if path.is_file()}
    data = {path for path in there if path.suffix not in {".py", ".pyc"}}
    assert data == installed
    assert {path.parent for path in there if path.suffix == ".py"} == rooms


def test_version_is_read_without_importing_anything_heavy():
    program = "import sys, tfaccel; print(tfaccel.__version__, 'keras' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)? False\n", done.stdout)


def test_supported_pythons_are_the_same_everywhere():
    supported = (Path(environment.__file__).parent / "find_python.sh").read_text()
    scripts = set(re.search(r"supported='(.*)'", supported).group(1).split())
    setup = read_setup()
    classifiers = set(re.findall(r":: (3\.\d+)", setup["metadata"]["classifiers"]))
    lowest, beyond = map(int, re.findall(r"3\.(\d+)", setup["options"]["python_requires"]))
    assert scripts == classifiers == {f"3.{minor}" for minor in range(lowest, beyond)}
