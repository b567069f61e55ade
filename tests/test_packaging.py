"""The wheel: its content, its commands and the alias in optimum-cli."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALIAS = "optimum/commands/register/register_mobilequant.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason='the build backend is missing: pip install "optimum-mobilequant[dev]"')
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--disable-pip-version-check", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built twice."""
    pytest.importorskip("hatchling", reason='the build backend is missing: pip install "optimum-mobilequant[dev]"')
    folders = [tmp_path_factory.mktemp("built") for _ in range(2)]
    for folder in folders:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folders


def test_builds_are_reproducible(built):
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in built)
    assert sorted(path.rsplit(".", 1)[1] for path in first) == ["gz", "whl"]
    assert first == second


def test_the_index_takes_wheel_and_sdist(built):
    pytest.importorskip("twine", reason='the check of packages is missing: pip install "optimum-mobilequant[dev]"')
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built[0].iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_sdist_is_the_checkout_without_the_rest(built):
    (path,) = built[0].glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert {"examples/demo_model/model.safetensors", "tests/tiny.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", ".venv"))]


def test_compiled_kernels_make_a_wheel_for_one_platform(tmp_path):
    pytest.importorskip("hatchling", reason='the build backend is missing: pip install "optimum-mobilequant[dev]"')
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "optimum_mobilequant", source / "optimum_mobilequant")
    bundled = source / "optimum_mobilequant" / "kernels" / "bundled"
    bundled.mkdir(exist_ok=True)
    (bundled / "linear-0.so").write_bytes(b"kernels")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert path.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(path) as archive:
        assert archive.read("optimum_mobilequant/kernels/bundled/linear-0.so") == b"kernels"
        assert "Root-Is-Purelib: false" in metadata(archive, "WHEEL")


def metadata(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_wheel_holds_the_package_and_the_alias_only(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert ALIAS in names
    assert "optimum_mobilequant/py.typed" in names
    assert [name for name in names if not name.startswith("optimum_mobilequant/")] == [ALIAS]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "optimum_mobilequant").rglob("*.py")}
    assert modules - set(names) == {"optimum_mobilequant/_optimum_cli.py"}  # its only place is the alias


def test_optimum_stays_a_namespace(wheel):
    assert not [name for name in wheel.namelist() if name.startswith("optimum/") and name.endswith("__init__.py")]


def test_wheel_has_the_command_and_the_licence(wheel):
    entry_points = ConfigParser()
    entry_points.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"mobilequant": "optimum_mobilequant.cli:main"}
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
    assert Parser().parsestr(metadata(wheel, "METADATA"))["License-Expression"] == "Apache-2.0"


def test_the_alias_adds_the_same_commands(wheel, tmp_path, capsys):
    pytest.importorskip("optimum.commands.optimum_cli")
    from optimum.commands.base import RootOptimumCLICommand
    from optimum.commands.optimum_cli import register_optimum_cli_subcommand

    path = Path(wheel.extract(ALIAS, tmp_path))
    spec = importlib.util.spec_from_file_location("register_mobilequant_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    (command,) = module.REGISTER_COMMANDS
    register_optimum_cli_subcommand(command, parent_command=root)

    args = root.parser.parse_args(["mobilequant", "eval", str(tmp_path), "--text", "none.txt"])
    with pytest.raises(SystemExit) as stopped:
        args.func(args).run()
    assert stopped.value.code == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    """An environment with this one's dependencies and nothing of this package but its wheel."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if "mobilequant" in item.name or item.name == "__pycache__":
            continue
        if item.name == "optimum":  # the wheel adds a file to it
            shutil.copytree(
                item, site / item.name, ignore=shutil.ignore_patterns("register_mobilequant*", "__pycache__")
            )
        else:
            (site / item.name).symlink_to(item)
    (path,) = built[0].glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--disable-pip-version-check", "--no-compile", str(path)]
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), *install]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run_in(clean, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(clean / "bin" / command[0]), *command[1:]]
    done = subprocess.run(words, cwd=clean, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="folders of a virtual environment have other names there")
def test_the_wheel_works_in_a_clean_environment(clean):
    where = run_in(clean, "python", "-c", "import optimum_mobilequant; print(optimum_mobilequant.__file__)")
    assert Path(where.strip()).is_relative_to(clean)
    assert "quantize" in run_in(clean, "mobilequant", "--help")
    text = run_in(clean, "python", "-m", "optimum.commands.optimum_cli", "mobilequant", "--help")
    assert all(name in text for name in ("quantize", "eval", "report", "inspect", "doctor"))
    kernels = list(clean.glob("lib/python*/site-packages/optimum_mobilequant/kernels/cpp/*.cpp"))
    assert len(kernels) >= 3  # what is compiled on first use
