"""Every command and snippet of README and docs is run, and every link and file they name is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from studies import instance_prompts, task_prompt_vectors

from softprompts import config
from softprompts.recipes.multitask import Plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Commands that are the test run itself, or that contain it.
RUN_ELSEWHERE = ("make ", "pip install .")

# Training is cut to two steps: that the command is right is tested here, what it reaches stands in the results.
SHORT = ["--set", "training.max_steps=2", "--set", "evaluation.resamples=100"]
MULTITASK = [
    *("--set", "sources=[{source: trec, split: {limit: {train: 40, validation: 8, test: 8}}}]"),
    *("--set", "targets=[{source: tweets, split: {limit: {train: 40, validation: 8, test: 8}}}]"),
    *(
        "--set",
        "teachers.training.max_steps=2",
        "--set",
        "source.training.max_steps=2",
        "--set",
        "target.few.max_steps=2",
    ),
    *("--set", "target.shots=[4]", "--set", "target.seeds=[0]", "--set", "target.learning_rates=[0.1]"),
    *("--set", "target.tune_on=null", "--set", "target.weight_targets=null"),
    *("--set", "target.few_arms=[prompt-tuning, mpt, spot-mixture]", "--set", "source.variants=[mpt, mixture]"),
    *("--set", "target.arms=[mpt]", "--set", "evaluation.resamples=100"),
]
STUDY = [
    *("--set", "tasks=[{source: trec, split: {limit: {train: 40, validation: 8, test: 8}}}, "
      "{source: tweets, split: {limit: {train: 40, validation: 8, test: 8}}}]"),
    *("--set", "groups={}", "--set", "vectors.training.max_steps=2", "--set", "vectors.learning_rates=[0.1]"),
    *("--set", "vectors.tune_on=null", "--set", "vectors.starts=[{seed: 0}, {seed: 1}]"),
    *("--set", "sums={starts: 1, coefficients: [0, 1], few: null}"),
    *("--set", "few.targets=[{target: {source: movies, split: {limit: {train: 40, validation: 8, test: 8}}}, "
      "sources: [trec, tweets]}]"),
    *("--set", "few.source.training.max_steps=2", "--set", "few.source.variants=[mixture]"),
    *("--set", "few.target.few.max_steps=2"),
    *("--set", "few.target.shots=[0, 4]", "--set", "few.target.seeds=[0]", "--set", "few.target.learning_rates=[0.1]"),
    *("--set", "few.target.arms=[prompt-tuning, vectors]", "--set", "evaluation.resamples=100"),
]  # fmt: skip
INSTANCE = [
    *("--set", "tasks=[{source: trec, split: {limit: {train: 40, validation: 8, test: 8}}}]"),
    *("--set", "arms=[prompt-tuning, ipt-pretrained, idpg-m]", "--set", "upper=[]", "--set", "speed.steps=2"),
    *("--set", "compare.training.max_steps=2", "--set", "compare.shots=[null]", "--set", "compare.seeds=[0]"),
    *("--set", "compare.learning_rates=[0.1]", "--set", "compare.tune_on=null", "--set", "compare.weight_targets=null"),
    *("--set", "pretrain.training.max_steps=2", "--set", "speed.repeats=1", "--set", "evaluation.resamples=100"),
]
SMALL = ["--set", "task.split.limit={train: 40, validation: 8, test: 8}"]


def blocks(language):
    """(page, content) of every fenced block of `language`."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.M | re.S)
    return [(page, text) for page in PAGES for text in pattern.findall(page.read_text(encoding="utf-8"))]


def commands():
    """(page, words) of every command in a shell block, comments left out."""
    lines = [(page, line.split(" #")[0].strip()) for page, text in blocks("sh") for line in text.splitlines()]
    return [(page, line) for page, line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory as a user has it after the demo, with the run cut short."""
    where = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", where / "examples")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "softprompts", "quickstart", *SHORT, *SMALL]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


@pytest.mark.assets
@pytest.mark.slow
def test_every_command_runs(folder, call, call_study, monkeypatch):
    """In this process, which saves starting one for each; the first, of the demo, has one of its own."""
    monkeypatch.chdir(folder)
    ran = 0
    for page, line in commands():
        if line.startswith(RUN_ELSEWHERE):
            continue
        words = shlex.split(line)
        study = words[:3] == ["python", "-m", "studies"]
        assert study or words[0] == "softprompts", f"{page.name}: {line}"
        arguments = words[3:] if study else words[1:]
        if arguments[0] in ("train", "pretrain"):
            arguments = [*arguments, *SHORT, *([] if "reviews" in line else SMALL)]
        if arguments[0] == "multitask":
            arguments = [*arguments, *MULTITASK]
        if study:
            arguments = [*arguments, *{"vectors": STUDY, "instance": INSTANCE}[arguments[0]]]
        if arguments[:2] == ["vector", "search"]:
            arguments = [*arguments, "--coefficients", "0,1"]
        if arguments[0] == "evaluate" and "--data" in arguments:
            continue  # thousands of rows; the same path is tested in test_cli
        status, _, said = (call_study if study else call)(*arguments)
        assert status == 0, f"{page.name}: {line}: {said}"
        ran += 1
    assert ran >= 5


@pytest.mark.assets
@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda x: x.name if isinstance(x, Path) else "")
def test_every_snippet_runs(page, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, f"{page.name}.py", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda x: x.name if isinstance(x, Path) else "")
def test_every_configuration_is_right(page, text):
    values = yaml.safe_load(text)
    config.parse(values, kind_of(values))


def kind_of(values):
    """What a configuration is of, by a section that only that has."""
    kinds = {"sources": Plan, "vectors": task_prompt_vectors.Study, "compare": instance_prompts.Study}
    kinds["own"] = instance_prompts.Study
    return next((kind for key, kind in kinds.items() if key in values), config.Run)


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_that_a_page_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`|\s{4})make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.M))
        assert named <= targets, f"{page.name}: {named - targets}"
    assert "demo" in re.findall(r"^make ([a-z-]+)", PAGES[0].read_text(encoding="utf-8"), re.M)


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        assert not re.search(r"^(QUICKSTART|PREDICT|RESULTS)$|QUICKMEAN|TODO", page.read_text(encoding="utf-8"), re.M)


def test_the_layout_in_the_design_is_the_layout():
    named = set(re.findall(r"\b(\w+)\.py\b", (ROOT / "docs" / "design.md").read_text(encoding="utf-8")))
    there = {p.stem for p in (ROOT / "src" / "softprompts").glob("*.py") if not p.stem.startswith("__")}
    assert there <= named, there - named
