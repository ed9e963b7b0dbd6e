"""The pins, the wheel, and the supported platforms. The set-up itself is tested in test_setup."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import softprompts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def no_cuda() -> ModuleType:
    """The check that CI runs after an installation."""
    spec = importlib.util.spec_from_file_location("no_cuda", ROOT / ".ci" / "no_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Installed:
    """A distribution of which only the name matters."""

    def __init__(self, name: str) -> None:
        self.metadata = {"Name": name}


def test_the_check_for_cuda_packages_can_fail(
    no_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["torch", "nvidia-cublas", "NVIDIA_nccl_cu13", "numpy"]
    monkeypatch.setattr(no_cuda, "distributions", lambda: [Installed(name) for name in names])
    assert no_cuda.main() == 1
    message = capsys.readouterr().err
    for part in ("2 CUDA packages: NVIDIA_nccl_cu13, nvidia-cublas", "TORCH_INDEX"):
        assert part in message
    monkeypatch.setattr(no_cuda, "distributions", lambda: [Installed(name) for name in ("torch", "py-nvidia-like")])
    assert no_cuda.main() == 0
    assert capsys.readouterr().err == ""


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines), f"{name} must pin every package with =="
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lower.txt"])
def test_every_dependency_is_pinned_and_none_is_cuda(name: str, no_cuda: ModuleType) -> None:
    from packaging.requirements import Requirement

    pinned = pins(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    if name == "constraints.txt":
        wanted += [one for one in project["optional-dependencies"]["dev"] if not one.startswith("softprompts")]
    for requirement in map(Requirement, wanted):
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"
    assert no_cuda.cuda_packages(pinned) == []
    assert pinned["torch"] == "2.13.0"  # without a local part, so that a build from any index fits


def test_both_ends_of_the_supported_transformers_are_pinned() -> None:
    assert pins("constraints-lower.txt")["transformers"].startswith("5.16.")
    assert pins("constraints.txt")["transformers"].startswith("5.24.")


@pytest.fixture(scope="module")
def uv() -> str:
    """The path of uv, on a machine where it reaches a package index."""
    path = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip("uv is not installed")
    probe = resolve(path, ["packaging"])
    if probe.returncode != 0:
        pytest.skip(f"no package index: {(probe.stderr.splitlines() or ['no message'])[-1]}")
    return path


def resolve(uv: str, requirements: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Let uv choose a version of every package that the requirements need, by wheels only; nothing is installed."""
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python", sys.executable]  # a search for other Pythons takes seconds
    return subprocess.run(
        [*command, *options, "-"],
        input="\n".join(requirements),
        capture_output=True,
        text=True,
        env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"},  # the oldest macOS that torch 2.13 has wheels for
        cwd=ROOT,
        check=False,
    )


@pytest.mark.index
@pytest.mark.parametrize("platform", ["x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(("constraints", "extra"), [("constraints.txt", "dev"), ("constraints-lower.txt", "test")])
def test_every_supported_platform_has_wheels_of_the_pinned_versions(
    uv: str, constraints: str, extra: str, python: str, platform: str
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["test"]
    if extra == "dev":
        requirements += project["optional-dependencies"]["dev"]
    # rouge-score publishes source only; it is pure Python.
    requirements = [line for line in requirements if not line.startswith(("softprompts", "rouge-score"))]
    options = ["--constraint", constraints, "--python-version", python, "--python-platform", platform]
    result = resolve(uv, requirements, *options)
    assert result.returncode == 0, result.stderr
    versions = dict(line.split("==") for line in result.stdout.splitlines())
    pinned = pins(constraints)
    assert {name: versions[name] for name in ("torch", "transformers", "numpy")} == {
        name: pinned[name] for name in ("torch", "transformers", "numpy")
    }
    unpinned = {name for name in versions if name not in pinned and not name.startswith(("nvidia-", "cuda-"))}
    assert unpinned <= {"setuptools", "triton"}, "torch needs these where it comes as a CUDA build, pip pins the rest"


def test_the_classifiers_name_the_supported_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    minors = [int(line.removeprefix(prefix)) for line in project["classifiers"] if line.startswith(prefix)]
    assert minors == [11, 12, 13, 14]
    assert project["requires-python"] == ">=3.11"


def run(*command: str | Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_", "PYTEST_"))}
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**kept, **environment},
        cwd=Path(sys.prefix),  # not the checkout: nothing may be found by accident
        check=False,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("softprompts-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment that has the package from its wheel, and borrows this one's dependencies."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-index", wheel)
    site = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A folder named in a .pth comes after the environment's own, and its own .pth (an editable install) is not read.
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "borrowed.pth").write_text("\n".join(sorted(ours)) + "\n", encoding="utf-8")
    return scripts


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path for path in (ROOT / "src" / "softprompts").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT / "src").as_posix() for path in sources} <= set(names)
    assert "softprompts/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "softprompts",
        f"softprompts-{softprompts.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_command_works_from_the_wheel(installed: Path) -> None:
    at = Path(run(installed / "python", "-c", "import softprompts; print(softprompts.__file__)").strip())
    assert at.is_relative_to(installed.parent)
    assert run(installed / "softprompts", "--version").strip() == f"softprompts {softprompts.__version__}"
    facts = json.loads(run(installed / "softprompts", "env", "--json"))
    assert {"softprompts", "python", "torch", "transformers"} <= facts.keys()
    assert facts["softprompts"] == softprompts.__version__
