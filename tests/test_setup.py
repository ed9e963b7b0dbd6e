"""`make env` and its neighbors, with scripts in place of Python, pip and uv that log how they are called."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TOOLS = [
    "make",
    "sh",
    "awk",
    "basename",
    "cat",
    "cp",
    "find",
    "grep",
    "head",
    "mkdir",
    "rm",
    "sed",
    "tee",
    "touch",
    "tr",
]

PYTHON = """#!/bin/sh
echo "python $*" >> "$LOG"
case "$*" in
    *sys.exit*) exit {unsupported} ;;
    *_base_executable*) echo "{path}" ;;
    *sys.version*) echo "{version}" ;;
    *"import ensurepip"*) exit {no_ensurepip} ;;
    "-m venv "*)
        [ {no_ensurepip} = 0 ] || {{ echo "install python3-venv"; exit 1; }}
        mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip config list") cat "$PIP_SETTINGS" ;;
    "-m pip install "*)
        failure=$(head -n 1 "$FAILURES")
        sed -i.old 1d "$FAILURES"
        if [ -n "$failure" ]; then echo "$failure" >&2; exit 1; fi
        [ -z "${{CUDA:-}}" ] || mkdir -p "${{0%/bin/python}}/lib/python3.11/site-packages/nvidia_nccl-1.dist-info" ;;
    "-m pytest "*) echo "threads that wait: $OMP_WAIT_POLICY" ;;
esac
"""

UV = """#!/bin/sh
echo "uv $*" >> "$LOG"
echo "uv index ${UV_INDEX:-} default ${UV_DEFAULT_INDEX:-} strategy ${UV_INDEX_STRATEGY:-}" >> "$LOG"
echo "uv links ${UV_FIND_LINKS:-} constraint ${UV_CONSTRAINT:-}" >> "$LOG"
case "$1" in
    venv) for folder; do :; done; mkdir -p "$folder/bin"; cp "$UVS_PYTHON" "$folder/bin/python" ;;
    pip) [ -z "${UV_FAILS:-}" ] || { echo "uv: connection reset" >&2; exit 1; } ;;
esac
"""

SLEEP = """#!/bin/sh
echo "sleep $*" >> "$LOG"
"""


@dataclass
class Machine:
    """A checkout and a PATH with nothing but the tools of a shell and the scripts of a test."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def script(self, name: str, text: str) -> Path:
        path = self.root / "bin" / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return path

    def python(self, name: str = "python3", version: str = "3.12.1", ensurepip: bool = True) -> Path:
        unsupported = int(not re.match(r"3\.1[1-4]\.", version))
        path = self.root / "bin" / name
        text = PYTHON.format(unsupported=unsupported, path=path, version=version, no_ensurepip=int(not ensurepip))
        return self.script(name, text)

    def fails(self, *messages: str) -> None:
        """The next calls of `pip install` fail with these messages; an empty one succeeds."""
        (self.root / "failures").write_text("".join(f"{message}\n" for message in messages), encoding="utf-8")

    def pip_settings(self, *lines: str) -> None:
        (self.root / "settings").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def make(self, *arguments: str, expect: int = 0, **environment: str) -> list[str]:
        """The lines that `make` prints, its standard error included."""
        (self.root / "log").write_text("", encoding="utf-8")
        result = subprocess.run(
            ["make", *arguments],
            cwd=self.root / "checkout",
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (result.returncode != 0) == (expect != 0), result.stdout
        return [line for line in result.stdout.splitlines() if not line.startswith("make")]

    @property
    def log(self) -> list[str]:
        return (self.root / "log").read_text(encoding="utf-8").splitlines()

    @property
    def installs(self) -> list[str]:
        """The calls that install packages, without the options that all of them share."""
        calls = [line for line in self.log if " pip install " in line]
        shared = r"(-m )?pip install |--quiet |--disable-pip-version-check |--no-input |--python \S+ "
        return [re.sub(shared, "", line) for line in calls]

    @property
    def env(self) -> Path:
        return self.root / "checkout" / ".venv"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without Python and uv."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        if path is None:
            pytest.skip(f"this machine has no {tool}")
        (programs / tool).symlink_to(path)
    (checkout / "scripts").mkdir(parents=True)
    for name in ("Makefile", "scripts/setup-env.sh", "pyproject.toml", "constraints.txt", "constraints-lower.txt"):
        shutil.copy(ROOT / name, checkout / name)
        os.utime(checkout / name, (1e9, 1e9))  # older than any environment
    names = {"LOG": "log", "FAILURES": "failures", "PIP_SETTINGS": "settings"}
    environment = {variable: str(tmp_path / name) for variable, name in names.items()}
    built = Machine(tmp_path, {"PATH": str(programs), **environment})
    built.script("sleep", SLEEP)
    built.fails()
    built.pip_settings()
    return built


@pytest.fixture
def laptop(machine: Machine) -> Machine:
    """A machine with Python 3.12."""
    machine.python()
    return machine


INSTALL = "--constraint constraints.txt --editable .[dev]"


def test_env_without_uv_installs_with_pip_once(laptop: Machine) -> None:
    (line,) = laptop.make("env")
    assert line.startswith("Setting up .venv with pip: ")
    assert laptop.installs == [f"python {INSTALL}"]
    assert "python -m venv .venv" in laptop.log
    assert (laptop.env / ".installed").exists()
    assert laptop.make("env") == []
    assert laptop.installs == []


def test_env_after_a_change_of_the_pins_keeps_the_folder(laptop: Machine) -> None:
    laptop.make("env")
    os.utime(laptop.env / ".installed", (1e9, 1e9))
    (laptop.root / "checkout" / "constraints.txt").touch()
    assert len(laptop.make("env")) == 1
    assert laptop.installs == [f"python {INSTALL}"]
    assert "python -m venv .venv" not in laptop.log


def test_env_for_the_lower_end_has_its_own_pins(laptop: Machine) -> None:
    laptop.make("test-lower")
    assert laptop.installs == ["python --constraint constraints-lower.txt --editable .[test]"]
    assert (laptop.root / "checkout" / ".venv-lower" / ".installed").exists()


def test_env_with_uv_on_path_installs_with_uv(laptop: Machine) -> None:
    laptop.script("uv", UV)
    (line,) = laptop.make("env")
    assert line.startswith("Setting up .venv with uv: ")
    assert laptop.installs == [f"uv {INSTALL}"]
    assert "python -m venv .venv" in laptop.log  # brings pip, which fetches the packaged models
    assert "uv index  default  strategy " in laptop.log


def test_env_hands_the_settings_of_pip_to_uv(laptop: Machine) -> None:
    laptop.script("uv", UV)
    laptop.pip_settings(
        ":env:.find-links='/wheels /more'",
        "global.cert='/cert.pem'",
        "global.constraint='/limits.txt'",
        "global.extra-index-url='\\nfile:///one\\nfile:///two'",
        "global.find-links='/elsewhere'",
        "global.index-url='file:///index'",
    )
    laptop.make("env")
    assert "uv index file:///one file:///two default file:///index strategy unsafe-best-match" in laptop.log
    assert "uv links /wheels,/more constraint /limits.txt" in laptop.log
    shutil.rmtree(laptop.env)
    laptop.make("env", UV_DEFAULT_INDEX="file:///mine")
    assert "uv index file:///one file:///two default file:///mine strategy unsafe-best-match" in laptop.log


def test_env_falls_back_to_pip_when_uv_fails(laptop: Machine) -> None:
    laptop.script("uv", UV)
    _, reason, fallback = laptop.make("env", UV_FAILS="1")
    assert reason == "uv: connection reset"
    assert fallback == "uv could not install the packages; pip tries next."
    assert laptop.installs == [f"uv {INSTALL}", f"python {INSTALL}"]


def test_env_without_an_index_leaves_uv_out(laptop: Machine) -> None:
    laptop.script("uv", UV)
    laptop.make("env", PIP_NO_INDEX="1")
    assert laptop.installs == [f"python {INSTALL}"]


def test_env_tries_a_failed_download_three_times(laptop: Machine) -> None:
    laptop.fails("ERROR: connection reset", "ERROR: read timed out")
    lines = laptop.make("env")
    assert lines[1:] == [
        "ERROR: connection reset",
        "The installation failed. Attempt 2 of 3 starts in 10 seconds.",
        "ERROR: read timed out",
        "The installation failed. Attempt 3 of 3 starts in 10 seconds.",
    ]
    assert laptop.installs == [f"python {INSTALL}"] * 3
    assert laptop.log.count("sleep 10") == 2


def test_env_that_fails_names_the_ways_behind_a_proxy_and_offline(laptop: Machine) -> None:
    laptop.fails(*["ERROR: connection reset"] * 3)
    *_, summary, proxy, offline = laptop.make("env", expect=2)
    assert len(laptop.installs) == 3
    assert summary == ".venv could not be set up; the reason is above."
    assert proxy.startswith("Behind a proxy: set HTTPS_PROXY")
    assert offline.startswith("Offline: run \"pip wheel -w wheels -c constraints.txt '.[dev]' hatchling editables\"")
    assert not (laptop.env / ".installed").exists()
    laptop.make("env")  # the next call continues in the same folder
    assert laptop.installs == [f"python {INSTALL}"]
    assert "python -m venv .venv" not in laptop.log


@pytest.mark.parametrize("message", ["ERROR: ResolutionImpossible: for help", "OSError: No space left on device"])
def test_env_does_not_repeat_what_cannot_succeed(laptop: Machine, message: str) -> None:
    laptop.fails(message)
    assert message in laptop.make("env", expect=2)
    assert len(laptop.installs) == 1


def test_env_takes_a_cuda_build_and_says_so_in_one_line(laptop: Machine) -> None:
    setting_up, note = laptop.make("env", CUDA="1")
    assert setting_up.startswith("Setting up .venv")
    assert note.startswith("torch came as a CUDA build")
    assert "make env TORCH_INDEX=ADDRESS" in note
    assert (laptop.env / ".installed").exists()
    assert laptop.make("env") == []


def test_env_with_an_index_for_torch_asks_it_for_torch_alone(laptop: Machine) -> None:
    torch = "--constraint constraints.txt --no-deps --index-url file:///cpu torch"
    assert len(laptop.make("env", "TORCH_INDEX=file:///cpu", CUDA="1")) == 1  # the user chose: no note
    assert laptop.installs == [f"python {torch}", f"python {INSTALL}"]
    assert laptop.make("env") == laptop.make("env", "TORCH_INDEX=file:///cpu") == []
    (laptop.root / "checkout" / "pyproject.toml").touch()
    os.utime(laptop.env / ".installed", (1e9, 1e9))
    laptop.make("env")  # the folder remembers its index
    assert laptop.installs == [f"python {torch}", f"python {INSTALL}"]
    assert "python -m venv .venv" not in laptop.log
    laptop.script("uv", UV)
    shutil.rmtree(laptop.env)
    laptop.make("env", TORCH_INDEX="file:///cpu")
    assert laptop.installs == [f"uv {torch}", f"uv {INSTALL}"]


def test_env_made_with_another_index_is_made_anew(laptop: Machine) -> None:
    laptop.make("env", CUDA="1")
    assert list(laptop.env.rglob("nvidia_*"))
    laptop.make("env", "TORCH_INDEX=file:///cpu")
    assert "python -m venv .venv" in laptop.log
    assert len(laptop.installs) == 2
    assert not list(laptop.env.rglob("nvidia_*"))


def test_env_made_with_another_python_is_made_anew(laptop: Machine) -> None:
    laptop.make("env")
    laptop.python("python3.13", "3.13.0")
    assert laptop.make("env") == []
    laptop.make("env", "PYTHON=python3.13")
    assert "python -m venv .venv" in laptop.log
    assert laptop.make("env", "PYTHON=python3.13") == laptop.make("env") == []
    (laptop.env / "bin" / "python").unlink()  # as after an upgrade that removed the old Python
    assert len(laptop.make("env")) == 1


def test_env_made_by_the_older_makefile_is_kept(laptop: Machine) -> None:
    laptop.make("env")
    (laptop.env / ".torch-index").unlink()
    assert laptop.make("env") == []


@pytest.mark.parametrize("version", ["3.9.6", "3.10.12", "3.15.0"])
def test_env_passes_over_a_python_that_is_not_supported(machine: Machine, version: str) -> None:
    machine.python("python3", version)
    (line,) = machine.make("env", expect=2)
    assert line == "There is no Python 3.11 to 3.14 here: install one, or uv, or say make PYTHON=..."
    (line,) = machine.make("env", "PYTHON=python3", expect=2)
    assert line == f"python3 is Python {version}, but 3.11 to 3.14 is needed: say make PYTHON=..."
    (line,) = machine.make("env", "PYTHON=python4", expect=2)
    assert line.startswith("There is no python4 here: ")
    machine.python("python3.13", "3.13.0")
    machine.make("env")
    assert (machine.env / "bin" / "python").read_bytes() == (machine.root / "bin" / "python3.13").read_bytes()


def test_env_without_python_lets_uv_provide_one(machine: Machine) -> None:
    machine.script("uv", UV)
    machine.make("env", UVS_PYTHON=str(machine.python("uvs-python")))
    assert "uv venv --quiet --seed --python >=3.11,<3.15 .venv" in machine.log
    assert machine.installs == [f"uv {INSTALL}"]


def test_env_lets_uv_make_the_folder_where_python_lacks_ensurepip(machine: Machine) -> None:
    machine.script("uv", UV)
    python = machine.python(ensurepip=False)
    machine.make("env", UVS_PYTHON=str(python))
    assert f"uv venv --quiet --seed --python {python} .venv" in machine.log
    assert "python -m venv .venv" not in machine.log


def test_env_without_ensurepip_and_uv_shows_what_python_says(machine: Machine) -> None:
    machine.python(ensurepip=False)
    lines = machine.make("env", expect=2)
    assert lines[1:] == ["install python3-venv", ".venv could not be made; the reason is above."]
    machine.python()
    machine.make("env")
    assert machine.installs == [f"python {INSTALL}"]


def test_threads_that_wait_sleep_unless_the_user_chose(laptop: Machine) -> None:
    assert laptop.make("test")[-1] == "threads that wait: PASSIVE"
    assert laptop.make("test", OMP_WAIT_POLICY="ACTIVE")[-1] == "threads that wait: ACTIVE"


def test_demo_runs_the_command_of_the_environment(laptop: Machine) -> None:
    laptop.make("env")
    shutil.copy(laptop.script("softprompts", '#!/bin/sh\necho "$1 $OMP_WAIT_POLICY"\n'), laptop.env / "bin")
    assert laptop.make("demo") == ["Running the demo.", "quickstart PASSIVE"]


def test_help_names_every_target_and_no_other(laptop: Machine) -> None:
    named = {line.split()[1] for line in laptop.make("help") if line.startswith("  make ")}
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony is not None
    assert named == set(phony[1].split()) - {"env-lower"}
    assert "ALLOW_CUDA" not in text


def test_ci_checks_for_cuda_packages_and_asks_the_index() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    order = ["make env", ".venv/bin/python .ci/no_cuda.py", "make check", "make test-wheels", "make test-lower"]
    assert [line for line in lines if line in order] == order
    assert "exec < /dev/null" in lines
