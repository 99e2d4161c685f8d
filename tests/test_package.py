"""What is published: a source archive, the wheel made from it, and that wheel in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BACKEND = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"


def build(what: str, source: Path, out: Path) -> Path:
    """Have the build backend make a "sdist" or a "wheel", as `python -m build --no-isolation` does."""
    command = [sys.executable, "-c", BACKEND.format(what), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, made from a copy of the sources, and the wheel, made from the archive alone."""
    folder = tmp_path_factory.mktemp("dist")
    checkout = folder / "checkout"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("quack_fx", "cli", "tests", "docs", "examples"):
        shutil.copytree(ROOT / name, checkout / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    sdist = build("sdist", checkout, folder)
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder)


def test_a_wheel_holds_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    """The commands lie in cli/ in the sources and in quack_fx/cli in the wheel."""
    sources = {f.relative_to(ROOT).as_posix() for f in (ROOT / "quack_fx").rglob("*.py")}
    sources |= {f"quack_fx/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / "cli").rglob("*.py")}
    with zipfile.ZipFile(archives[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert names == sources | {"quack_fx/py.typed"}
    assert "quack-fx = quack_fx.cli.app:main" in info["entry_points.txt"]
    assert "quack_fx = quack_fx.qk_norm.dynamo:quack_fx" in info["entry_points.txt"]
    assert "Apache License" in info["LICENSE"]
    assert all(f"Requires-Dist: {need}\n" in info["METADATA"] for need in PROJECT["dependencies"])


def test_a_source_archive_holds_what_a_wheel_is_made_of(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "cli/app.py", "quack_fx/py.typed"} <= names


def test_the_wheel_works_in_an_environment_of_its_own(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing is downloaded: the environment looks into this one's packages, behind its own, for torch and the others
    that quack-fx needs. It does not see this one's quack-fx, which a .pth file there puts in place."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(archives[1])], check=True, capture_output=True)
    scheme = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    own = Path(sysconfig.get_path("purelib", "venv", scheme))
    (own / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        str(python), "-c", "import quack_fx, quack_fx.cli as cli; print(quack_fx.__file__, cli.__file__, sep=chr(10))"
    )
    assert [Path(line).is_relative_to(own) for line in where.splitlines()] == [True, True]
    printed = run(str(python.parent / "quack-fx"), "inspect", "examples/gpt.py")
    assert "found  4 attentions, all equal" in printed and "32h+192:32h+224" in printed
