"""Two processes (gloo) train what one process trains; this file is also the program that they run."""

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import local
from softprompts.artifacts import artifact
from softprompts.artifacts.io import read_tensors, write_tensors
from softprompts.data import EncodedExample
from softprompts.injection import Site
from softprompts.training.checkpoint import CHECKPOINT
from softprompts.training.loop import is_main_process
from test_together import config, encoded, run_of, trainees, tuned, values
from test_together import double as backbone
from trainees import train_many

ROOT = Path(__file__).parents[1]


def cases(folder):
    """Three runs together and three alone; batches of 3 and 1 make uneven shards, and a process without rows."""
    joint = trainees("llama", Site(), folder / "joint")
    base = backbone("gpt2")
    rows = [*encoded("gpt2", 6, 5), EncodedExample([5, 6, 7], [-100, -100, -100])]  # one row has no label at all
    settings = config(6, batch_size=3, gradient_accumulation_steps=2)
    alone = run_of("alone", tuned(base, Site("kv"), 3, 4), rows, settings)
    # Most batches hold one task only, whose prompt alone may move.
    two = tuned(base, Site(), 3, 8, ("a", "b"))
    sparse = run_of("sparse", two, encoded("gpt2", 4, 9, tasks=2), config(6, batch_size=1, weight_decay=0.1))
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    watched = run_of(
        "watched",
        tuned(base, Site(), 3, 4),
        encoded("gpt2", 5, 6),
        config(6, batch_size=2, eval_steps=1, early_stopping_patience=2),
        # Each process has scores of its own; the first one's must decide.
        validate=lambda: next(scores) if is_main_process() else 0.0,
    )
    return [
        joint,
        [replace(alone, directory=folder / "alone")],
        [sparse],
        [replace(watched, directory=folder / "watched")],
    ]


def work(folder, out):
    """Train every case and write losses and prompts of this process."""
    losses, prompts = {}, {}
    for runs in cases(folder):
        runs = [replace(one, config=one.config.model_copy(update={"max_steps": 6})) for one in runs]
        with closing(train_many(runs)) as steps:
            for name, report in steps:
                losses.setdefault(name, []).append(report.loss)
        prompts |= {one.name: values(one) for one in runs}
    write_tensors(out / f"{os.environ.get('RANK', 'one')}.safetensors", prompts, {"losses": json.dumps(losses)})


def launch(*arguments):
    """Run a program in two processes, as torchrun does (on CPUs `accelerate launch` itself knows only MPI)."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[:6000]
    return done


def test_two_processes_take_the_steps_of_one(tmp_path):
    launch(__file__, tmp_path / "two", tmp_path)
    work(tmp_path / "one", tmp_path)
    files = {name: read_tensors(tmp_path / f"{name}.safetensors") for name in ("one", "0", "1")}
    losses = {name: json.loads(metadata["losses"]) for name, (_, metadata) in files.items()}
    assert {name: len(found) for name, found in losses["one"].items()} == {
        "plain": 6, "factored": 6, "accumulated": 6, "alone": 6, "sparse": 6, "watched": 4,
    }  # fmt: skip
    for rank in ("0", "1"):
        assert losses[rank].keys() == losses["one"].keys()
        for name, expected in losses["one"].items():
            assert losses[rank][name] == pytest.approx(expected, rel=1e-9), name
            torch.testing.assert_close(files[rank][0][name], files["one"][0][name], rtol=1e-9, atol=1e-10)
    for name in ("joint/plain", "alone"):
        one, two = (read_tensors(tmp_path / count / name / CHECKPOINT)[0] for count in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-9, atol=1e-10)


def test_the_command_in_two_processes_writes_and_prints_once(tmp_path):
    values = local.run_values(tmp_path, max_steps=4, batch_size=3, eval_steps=2)
    values["task"]["split"]["limit"] = {"train": 10, "test": 6, "validation": 4}
    values["runs"] = [{"name": "a", "seed": 1}, {"name": "b", "training.learning_rate": 0.1}]
    for name, run in (("two", launch), ("one", lambda *arguments: cli(arguments))):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / name)}))
        done = run("-m", "softprompts", "train", "--config", file)
        assert done.stdout.count("next:") == 1
        assert done.stderr.count("training a 4/4") == 1
        assert done.stderr.count(f"writing {tmp_path / name / 'a'}") == 1
    for name in ("a", "b"):
        one, two = (artifact.load(tmp_path / out / name / "prompt").prompt for out in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        found = [json.loads((tmp_path / out / name / "results.json").read_text()) for out in ("one", "two")]
        curves = [[row["loss"] for row in one["curve"]] for one in found]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
        assert len(curves[0]) == 4
        assert found[0]["validation"] == found[1]["validation"]


def cli(arguments):
    """The command in one process."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=True
    )


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
