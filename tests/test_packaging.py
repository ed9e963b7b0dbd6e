"""The set-up and the wheel: no CUDA libraries that nobody asked for, a package that works outside of the checkout."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest

import softprompts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def no_cuda() -> ModuleType:
    """The check that the Makefile runs after an installation."""
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


@pytest.mark.skipif(os.environ.get("ALLOW_CUDA", "") not in ("", "0"), reason="ALLOW_CUDA is set")
def test_this_environment_has_no_cuda_packages(no_cuda: ModuleType) -> None:
    assert no_cuda.cuda_packages(one.metadata["Name"] or "" for one in distributions()) == []


def test_the_check_for_cuda_packages_can_fail(
    no_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["torch", "nvidia-cublas", "NVIDIA_nccl_cu13", "numpy"]
    monkeypatch.setattr(no_cuda, "distributions", lambda: [Installed(name) for name in names])
    monkeypatch.delenv("ALLOW_CUDA", raising=False)
    assert no_cuda.main() == 1
    message = capsys.readouterr().err
    for part in ("2 CUDA packages", "nvidia-cublas", "TORCH_INDEX=", "ALLOW_CUDA=1"):
        assert part in message
    monkeypatch.setenv("ALLOW_CUDA", "1")
    assert no_cuda.main() == 0
    monkeypatch.delenv("ALLOW_CUDA")
    monkeypatch.setattr(no_cuda, "distributions", lambda: [Installed(name) for name in ("torch", "py-nvidia-like")])
    assert no_cuda.main() == 0


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
