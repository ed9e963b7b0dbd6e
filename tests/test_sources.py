"""Rows from files, whole and streamed, their splits, and every message for data that cannot be used."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompts.assets.datasets import read_rows, with_packaged_defaults
from softprompts.config import SplitConfig, TaskConfig
from softprompts.data import PACKAGED, load_task, read_splits
from softprompts.data.sources import read_file, stream_rows
from softprompts.data.splits import Table, divide
from softprompts.data.templates import text_key
from softprompts.errors import DataError


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def table(path: Path, count: int = 40, classes: int = 2) -> str:
    return write(path, "text,label\n" + "".join(f"row number {i},c{i % classes}\n" for i in range(count)))


def texts(rows) -> list[str]:
    return [row["text"] for row in rows]


# Formats


def test_the_same_rows_from_every_format(tmp_path):
    import datasets

    wanted = [
        {"text": 'he said "hi", twice', "label": "a"},
        {"text": "two\nlines", "label": "b"},
        {"text": "x", "label": "a"},
    ]
    write(tmp_path / "d.csv", '\ufefftext,label\n"he said ""hi"", twice",a\n\n"two\nlines",b\nx,a\n')
    write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, wanted)) + "\n\n")
    write(tmp_path / "d.json", json.dumps(wanted))
    write(tmp_path / "d.tsv", 'text\tlabel\n"he said ""hi"", twice"\ta\n"two\nlines"\tb\nx\ta\n')
    data = datasets.Dataset.from_list(wanted)
    data.to_parquet(tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "disk")
    split = SplitConfig(validation_fraction=0, test_fraction=0)
    for name in ("d.csv", "d.jsonl", "d.json", "d.tsv", "d.parquet", "disk"):
        splits = read_splits(TaskConfig(source=str(tmp_path / name), split=split))
        assert list(splits.train) == wanted, name
        assert splits.columns == ("text", "label"), name
        assert (splits.validation, splits.test, splits.notes) == ((), (), ()), name


def test_a_quotation_mark_in_a_tsv_file_is_an_ordinary_character(tmp_path):
    source = write(tmp_path / "d.tsv", 'text\tlabel\n"No way\ta\nsaid he"\tb\n')
    assert texts(
        read_splits(TaskConfig(source=source, split=SplitConfig(validation_fraction=0, test_fraction=0))).train
    ) == [
        '"No way',
        'said he"',
    ]


def test_class_numbers_of_a_dataset_get_their_names(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    data = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 1, -1]}, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "disk")
    splits = read_splits(
        TaskConfig(source=str(tmp_path / "disk"), split=SplitConfig(validation_fraction=0, test_fraction=0))
    )
    assert [row["label"] for row in splits.train] == ["bad", "good", "good"]
    assert splits.notes == (f"{tmp_path / 'disk'} train: 1 rows with nothing in 'label' left out",)


def test_a_folder_of_files_has_the_splits_its_names_say(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train-00000-of-00002.csv", "text,label\na,x\n")
    write(tmp_path / "data/train-00001-of-00002.csv", "text,label\nb,y\n")
    write(tmp_path / "data/dev.jsonl", '{"text": "c", "label": "x"}')
    write(tmp_path / "data/test.csv", "text,label\nd,y\n")
    splits = read_splits(TaskConfig(source=str(tmp_path)))
    assert (texts(splits.train), texts(splits.validation), texts(splits.test)) == (["a", "b"], ["c"], ["d"])


# Files read row by row


CSV = 'text,label\n"a ""quoted"", field",x\r\n"two\nlines",y\n\nplain,\xe9\n'
TSV = 'text\tlabel\nhe said "no\tx\nfine\ty\n'
QUOTED = 'text\tlabel\n"a\tb"\tx\nfine\ty\n'
JSONL = '{"text": "a\u2028b", "n": 1}\n\n{"text": null, "n": [1, 2]}'


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", CSV), ("b.csv", "\ufeff" + CSV), ("c.tsv", TSV), ("d.tsv", QUOTED), ("e.jsonl", JSONL)],
)
def test_a_stream_has_the_rows_of_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    whole = [dict(row) for row in read_file(tmp_path / name)[""].rows]
    assert list(stream_rows(tmp_path / name)) == whole
    assert len(whole) == (3 if name.endswith(".csv") else 2)


def test_a_stream_of_parquet_and_json(tmp_path):
    import datasets

    rows = [{"text": f"t{i}", "label": i % 2} for i in range(5000)]
    dataset = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    streamed = list(stream_rows(tmp_path / "a.parquet"))
    assert streamed == [{"text": f"t{i}", "label": ("no", "yes")[i % 2]} for i in range(5000)]
    (tmp_path / "b.json").write_text(json.dumps(rows[:3]))
    assert list(stream_rows(tmp_path / "b.json")) == rows[:3]


@pytest.mark.parametrize(
    ("name", "content", "before"),
    [
        ("a.csv", b"text,label\na,x\nb,y,z\nc,x\n", 1),
        ("b.csv", b"text,label\na,x\nb,y\n\xff,x\n", 2),
        ("c.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "c"}\n', 1),
        ("d.jsonl", b'{"text": "a"}\n["b"]\n', 1),
        ("e.jsonl", b'{"text": "a"}\n{"text": "\0"}\n', 1),
        ("f.tsv", b"text\tlabel\na\tx\nb\n", 1),
    ],
)
def test_a_stream_names_a_broken_row_once_those_before_it_are_read(tmp_path, name, content, before):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as whole:
        read_file(tmp_path / name)
    rows = stream_rows(tmp_path / name)
    assert [row["text"] for row in itertools.islice(rows, before)] == ["a", "b"][:before]
    with pytest.raises(DataError) as streamed:
        next(rows)
    assert str(streamed.value) == str(whole.value)
    assert f"{tmp_path / name}:" in str(streamed.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b""), ("b.csv", b"text,label\n"), ("c.jsonl", b"\n\n"), ("d.txt", b"x"), ("e.parquet", b"PAR0"),
     ("g.csv", b"a;b\n1;2\n")],
)  # fmt: skip
def test_a_stream_of_what_is_no_file_of_rows_is_refused_at_once(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as whole:
        read_file(tmp_path / name)
    with pytest.raises(DataError) as streamed:
        stream_rows(tmp_path / name)
    assert str(streamed.value) == str(whole.value)
    with pytest.raises(DataError, match="no file"):
        stream_rows(tmp_path / "nothing.csv")


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path):
    """The file goes on growing: what is written after the first row was taken is read too."""
    with (tmp_path / "a.jsonl").open("w", buffering=1) as file:
        file.write('{"n": 0}\n')
        rows = stream_rows(tmp_path / "a.jsonl")
        for i in range(1, 20_000):
            assert next(rows) == {"n": i - 1}
            file.write(json.dumps({"n": i}) + "\n")


# Splits


def test_fractions_are_of_texts_and_stratified(tmp_path):
    splits = read_splits(TaskConfig(source=table(tmp_path / "d.csv", 200, 4)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (162, 18, 20)
    assert Counter(row["label"] for row in splits.test) == {"c0": 5, "c1": 5, "c2": 5, "c3": 5}


def test_splits_do_not_depend_on_the_order_of_the_rows_but_on_the_seed(tmp_path):
    lines = Path(table(tmp_path / "a.csv", 100)).read_text().splitlines()
    backwards = write(tmp_path / "b.csv", "\n".join([lines[0], *lines[:0:-1]]) + "\n")

    def sets(source, **split):
        splits = read_splits(TaskConfig(source=source, split=SplitConfig(**split)))
        return [set(texts(part)) for part in (splits.train, splits.validation, splits.test)]

    for split in ({}, {"shots": 4}, {"limit": {"train": 11, "test": 3}}):
        assert sets(str(tmp_path / "a.csv"), **split) == sets(backwards, **split), split
        assert sets(backwards, **split) != sets(backwards, seed=1, **split), split


def test_own_splits_win_over_fractions_and_the_test_split_stays_whole(tmp_path):
    source = write(
        tmp_path / "d.json",
        json.dumps(
            {
                "train": [{"text": f"t{i}", "label": "a"} for i in range(20)] + [{"text": "shared", "label": "a"}],
                "test": [{"text": "SHARED ", "label": "a"}, {"text": "u", "label": "a"}, {"text": "u", "label": "b"}],
            }
        ),
    )
    splits = read_splits(TaskConfig(source=source))
    assert texts(splits.test) == ["SHARED ", "u", "u"]
    assert len(splits.validation) == 2
    assert set(texts(splits.train)) | set(texts(splits.validation)) == {f"t{i}" for i in range(20)}
    assert splits.notes == (
        "test: kept as the source has it, with 1 repeated texts",
        "train: 1 rows left out whose text is also in a later split",
    )


def test_splits_may_be_named(tmp_path):
    parts = {
        name: [{"text": f"{name}{i}", "label": "a"} for i in range(10)] for name in ("train", "validation", "test")
    }
    source = write(tmp_path / "d.json", json.dumps(parts))
    other = write(tmp_path / "o.csv", "text,label\nother,a\n")
    splits = read_splits(
        TaskConfig(source=source, split=SplitConfig(test="validation"))
    )  # common where test has no labels
    assert set(texts(splits.test)) == {f"validation{i}" for i in range(10)}
    assert len(splits.validation) == 1
    assert all(text.startswith("train") for text in texts(splits.validation))
    assert texts(read_splits(TaskConfig(source=source, split=SplitConfig(test=other))).test) == ["other"]


def test_a_test_split_without_labels_is_drawn_from_the_training_rows(tmp_path):
    rows = [{"text": f"t{i}", "label": "a"} for i in range(10)]
    source = write(tmp_path / "d.json", json.dumps({"train": rows, "test": [{"text": "x", "label": None}]}))
    splits = read_splits(TaskConfig(source=source))
    assert len(splits.test) == 1
    assert texts(splits.test) != ["x"]


def test_duplicates_and_contradictions_are_left_out_and_counted(tmp_path):
    source = write(tmp_path / "d.csv", "text,label\na,x\na,x\na ,x\nb,x\nB,y\nc,y\nC,y\n")
    splits = read_splits(TaskConfig(source=source, split=SplitConfig(validation_fraction=0, test_fraction=0)))
    assert [(row["text"], row["label"]) for row in splits.train] == [("a", "x"), ("c", "y"), ("C", "y")]
    assert splits.notes == (
        "train: 2 exact duplicates left out",
        "train: 1 texts with contradicting labels left out (2 rows)",
    )
    answers = read_splits(
        TaskConfig(source=source, kind="generation", split=SplitConfig(validation_fraction=0, test_fraction=0))
    )
    assert len(answers.train) == 5  # several replies to one text are no contradiction


def test_shots_are_per_class_and_limit_the_validation_rows(tmp_path):
    source = write(tmp_path / "d.csv", "text,label\n" + "".join(f"t{i},{'abc'[min(i // 40, 2)]}\n" for i in range(90)))
    splits = read_splits(TaskConfig(source=source, split=SplitConfig(shots=3, validation_fraction=0.4)))
    assert Counter(row["label"] for row in splits.train) == {"a": 3, "b": 3, "c": 3}
    assert Counter(row["label"] for row in splits.validation) == {"a": 3, "b": 3, "c": 3}
    assert len(splits.test) == 9
    many = read_splits(TaskConfig(source=source, split=SplitConfig(shots=20)))
    assert Counter(row["label"] for row in many.train) == {"a": 20, "b": 20, "c": 8}
    assert many.notes == ("train: fewer than 20 shots of c 8",)
    free = read_splits(TaskConfig(source=source, kind="generation", split=SplitConfig(shots=5)))
    assert (len(free.train), len(free.validation)) == (5, 5)


def test_shots_drawn_by_a_seed_of_their_own_leave_the_other_rows_as_they_are(tmp_path):
    source = write(tmp_path / "d.csv", "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(80)))
    by_seed = [
        read_splits(TaskConfig(source=source, split=SplitConfig(shots=3, shots_seed=seed, validation_fraction=0.3)))
        for seed in (None, 0, 1, 2)
    ]
    assert all(splits.test == by_seed[0].test for splits in by_seed)
    assert by_seed[0].train == by_seed[1].train  # without one, that of the split
    assert len({tuple(row["text"] for row in splits.train) for splits in by_seed[1:]}) == 3
    assert len({tuple(row["text"] for row in splits.validation) for splits in by_seed[1:]}) == 3


@pytest.mark.parametrize("kind", ["label", "multilabel", "generation", "regression"])
def test_shots_per_set_are_so_many_in_all(tmp_path, kind):
    """Whatever the classes are; as many to choose with, and the test rows stay."""
    source = write(tmp_path / "d.csv", "text,label\n" + "".join(f"t{i},{i % 3}\n" for i in range(90)))
    whole = read_splits(TaskConfig(source=source, kind=kind, split=SplitConfig(validation_fraction=0.3)))
    for shots in (1, 5, 20):
        split = SplitConfig(shots=shots, shots_per="set", validation_fraction=0.3)
        splits = read_splits(TaskConfig(source=source, kind=kind, split=split))
        assert (len(splits.train), len(splits.validation)) == (shots, shots)
        assert splits.test == whole.test
        assert {*texts(splits.train)} <= {*texts(whole.train)}
        assert {*texts(splits.validation)} <= {*texts(whole.validation)}
        assert splits.notes == ()


def test_shots_per_set_by_their_seed_and_not_by_the_order_of_rows(tmp_path):
    lines = [f"t{i},{'ab'[i % 9 == 0]}\n" for i in range(90)]
    write(tmp_path / "d.csv", "text,label\n" + "".join(lines))
    write(tmp_path / "turned.csv", "text,label\n" + "".join(lines[::-1]))

    def drawn(name="d.csv", **split):
        split = SplitConfig(shots_per="set", validation_fraction=0.3, **split)
        return read_splits(TaskConfig(source=str(tmp_path / name), split=split))

    by_seed = [drawn(shots=6, shots_seed=seed) for seed in range(4)]
    assert len({tuple(texts(splits.train)) for splits in by_seed}) == 4
    assert len({tuple(texts(splits.validation)) for splits in by_seed}) == 4
    assert all(splits.test == by_seed[0].test for splits in by_seed)
    assert sorted(texts(drawn("turned.csv", shots=6, shots_seed=2).train)) == sorted(texts(by_seed[2].train))
    assert {*texts(by_seed[0].train)} < {*texts(drawn(shots=12, shots_seed=0).train)}, "more shots hold the fewer"
    counts = [Counter(row["label"] for row in drawn(shots=6, shots_seed=seed).train) for seed in range(12)]
    assert len({count["a"] for count in counts}) > 1, "drawn from all rows, not class by class"


def test_shots_per_set_that_are_not_there_are_told(tmp_path):
    source = write(tmp_path / "d.csv", "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(10)))
    split = SplitConfig(shots=20, shots_per="set", validation_fraction=0.2, test_fraction=0)
    splits = read_splits(TaskConfig(source=source, split=split))
    assert (len(splits.train), len(splits.validation)) == (8, 2)
    assert splits.notes == ("train: fewer than 20 shots of rows 8",)


def test_shots_of_a_multilabel_task_reach_every_label(tmp_path):
    source = write(tmp_path / "d.csv", "text,label\n" + "".join(f't{i},"a,{"bcd"[i % 3]}"\n' for i in range(60)))
    splits = read_splits(TaskConfig(source=source, kind="multilabel", split=SplitConfig(shots=2)))
    counts = Counter(name for row in splits.train for name in row["label"].split(","))
    assert {counts[name] for name in "bcd"} == {2}


def test_nothing_in_the_label_column_is_no_label_but_in_a_multilabel_task(tmp_path):
    source = write(tmp_path / "d.csv", 'text,label\na,x\nb,\nc,"x,y"\n')
    split = SplitConfig(validation_fraction=0, test_fraction=0)
    assert texts(read_splits(TaskConfig(source=source, kind="multilabel", split=split)).train) == ["a", "b", "c"]
    splits = read_splits(TaskConfig(source=source, split=split))
    assert texts(splits.train) == ["a", "c"]
    assert splits.notes == (f"{source}: 1 rows with nothing in 'label' left out",)


def test_limit_keeps_the_proportions(tmp_path):
    source = write(tmp_path / "d.csv", "text,label\n" + "".join(f"t{i},{'a' if i < 90 else 'b'}\n" for i in range(120)))
    splits = read_splits(
        TaskConfig(source=source, split=SplitConfig(limit={"train": 20}, validation_fraction=0, test_fraction=0))
    )
    assert Counter(row["label"] for row in splits.train) == {"a": 15, "b": 5}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "A", " a", "b", "c", "d d", "d  D", "e", "f", "g"]), st.sampled_from("xy"))
    ),
    st.lists(st.tuples(st.sampled_from(["a", "c", "h"]), st.sampled_from("xy"))),
    st.floats(0, 0.5),
    st.floats(0, 0.4),
    st.integers(0, 3),
    st.sampled_from(["label", "generation"]),
)
def test_no_text_is_in_two_splits(train, test, validation_fraction, test_fraction, seed, kind):
    def made(cells, name):
        return Table(name, [{"text": text, "label": label} for text, label in cells], ("text", "label"))

    split = SplitConfig(validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed)
    tables = {"train": made([*train, ("only here", "x")], "train")} | ({"test": made(test, "test")} if test else {})
    try:
        splits = divide(tables, TaskConfig(kind=kind, split=split), ("text",))
    except DataError:  # all texts went to the other splits
        return
    seen = [{text_key(row, ("text",)) for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen))
    if test:
        assert [(row["text"], row["label"]) for row in splits.test] == test
    if kind == "label":
        for part in (splits.train, splits.validation):
            labels = {}
            for row in part:
                assert labels.setdefault(text_key(row, ("text",)), row["label"]) == row["label"]


# Messages


BROKEN = {
    "empty": ("d.csv", b"", "d.csv is empty"),
    "header only": ("d.csv", b"text,label\n", "d.csv has no rows beneath its header"),
    "semicolons": (
        "d.csv",
        b"text;label\na;b\n",
        "d.csv looks like it is separated by ';', this suffix means commas (.csv)",
    ),
    "tabs": ("d.csv", b"text\tlabel\na\tb\n", "looks like it is separated by tabs"),
    "commas": ("d.tsv", b"text,label\na,b\n", "looks like it is separated by ',', this suffix means tabs (.tsv)"),
    "too many fields": (
        "d.csv",
        b'text,label\n"a\nb",x\na,b,c\n',
        "d.csv:4: 3 fields, but the header has 2: text, label;",
    ),
    "too few fields": ("d.tsv", b"text\tlabel\na\n", "d.tsv:2: 1 fields, but the header has 2"),
    "open quotes": ("d.csv", b'text,label\na,b\n"a,b\nc,d\n', "d.csv:3: broken row: unexpected end of data"),
    "text behind quotes": ("d.csv", b'text,label\n"a"b,c\n', "d.csv:2: broken row: ',' expected after '\"'"),
    "latin-1": ("d.csv", b"text,label\na,b\ncaf\xe9,b\n", "d.csv:3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    "NUL": ("d.csv", b"text,label\na,b\na\0,b\n", "d.csv:3: a NUL byte"),
    "two columns": ("d.csv", b"text,text\na,b\n", "d.csv has two columns called 'text'"),
    "broken json line": ("d.jsonl", b'{"text": "a"}\n{"text": \n', "d.jsonl:2: broken row: Expecting value at column"),
    "no object": ("d.jsonl", b'{"text": "a"}\n\n[1]\n', "d.jsonl:3: expected an object of columns, found list"),
    "broken json": ("d.json", b'[{"text": "a"},\n', "not JSON: "),
    "json text": ("d.json", b'"a"', "d.json must be a list of objects, or an object with such a list for each split"),
    "json row": ("d.json", b'[{"a": 1}, 2]', "d.json row 2: expected an object of columns, found int"),
    "no json rows": ("d.json", b"[]", "d.json has no rows"),
    "parquet": ("d.parquet", b"PAR2", "d.parquet is not a parquet file: "),
    "no table": ("d.txt", b"a", "d.txt is none of the files read here: .csv, .tsv, .jsonl, .json, .parquet"),
    "column": ("d.csv", b"txt,label\na,b\n", None),
}


@pytest.mark.parametrize("name", [name for name, case in BROKEN.items() if case[2]])
def test_a_broken_file_is_named(name, tmp_path):
    file, content, message = BROKEN[name]
    with pytest.raises(DataError) as error:
        read_splits(TaskConfig(source=write(tmp_path / file, content)))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"template": "{tetx}"}, "no column 'tetx' for the template; did you mean 'text'? columns: text, label"),
        ({"template": "Type:"}, "the template 'Type:' has no slot for the text, so that all rows would be the same; "
         "write a column in braces, as in 'Type:{text}'"),
        ({"pair": "{other}"}, "no column 'other' for the template; columns: text, label"),
        ({"label": "labels"}, "no column 'labels' for the label; did you mean 'label'? columns: text, label"),
        ({"verbalizer": {"c0": "a", "c3": "b"}},
         "d.csv:3: label 'c1' is not in the verbalizer; did you mean 'c3'? known labels: c0, c3"),
        ({"verbalizer": {"c0": "same", "c1": "same"}}, "labels 'c0' and 'c1' have the same answer 'same'"),
        ({"verbalizer": {"c0": " ", "c1": "b"}}, "the verbalizer's answer for label 'c0' is empty"),
        ({"positive": "c9"}, "positive label 'c9' is not in the verbalizer; did you mean 'c1'? known labels: c0, c1"),
        ({"truncate": ["txet"]}, "no column 'txet' for the truncation; did you mean 'text'? columns: text, label"),
        ({"kind": "regression"}, "d.csv:2: 'c0' in column 'label' is not a number"),
        ({"template": "{text"}, "template '{text': '{' at character 1 names no column; write {column}, and {{ or }}"),
        ({"split": {"test": "tset"}}, "has no split 'tset' for test; it has no named splits; or give a file"),
        ({"split": {"test": "no.csv"}}, "no file no.csv"),
        ({"split": {"test_fraction": 0.99, "validation_fraction": 0.99}}, "no rows are left to train on"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_rows_is_said(task, message, tmp_path):
    source = table(tmp_path / "d.csv", 40)
    with pytest.raises(DataError) as error:
        load_task(TaskConfig.model_validate({"source": source, **task}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_is_asked_for_where_columns_leave_a_choice(tmp_path):
    source = write(tmp_path / "d.csv", "a,b,label\n1,2,x\n3,4,y\n")
    with pytest.raises(DataError, match=r"give the task a template, such as '\{a\}'; columns: a, b"):
        load_task(TaskConfig(source=source))
    assert (
        load_task(TaskConfig(source=write(tmp_path / "e.csv", "q,label\n1,x\n3,y\n5,x\n"))).template.template == "{q}"
    )


def test_splits_that_do_not_exist_are_said(tmp_path):
    source = write(
        tmp_path / "d.json", json.dumps({"a": [{"text": "x", "label": "y"}], "b": [{"text": "z", "label": "y"}]})
    )
    with pytest.raises(DataError, match=r"has no split to train on; splits: a, b; name one with split\.train"):
        read_splits(TaskConfig(source=source))
    with pytest.raises(DataError, match=r"has no split 'bb' for test; did you mean 'b'\? splits: a, b; or give a file"):
        read_splits(TaskConfig(source=source, split=SplitConfig(train="a", test="bb")))
    with pytest.raises(DataError, match="'a' is named for more than one of train, validation and test"):
        read_splits(TaskConfig(source=source, split=SplitConfig(train="a", test="a")))
    with pytest.raises(DataError, match="holds the splits a, b; give a file with one table for a single split"):
        read_splits(TaskConfig(source=source, split=SplitConfig(train="a", test=source)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trce", "unknown source 'trce'; did you mean 'trec'? give a file, a folder, a hub name"),
        ("zzz", "or a packaged set: trec, trec-fine, sms-spam"),
        ("./nothing", "no file ./nothing"),
        ("trian.csv", "no file trian.csv; did you mean 'train.csv'?"),
    ],
)
def test_an_unknown_source_is_said(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "train.csv")
    with pytest.raises(DataError) as error:
        read_splits(TaskConfig(source=source))
    assert message in str(error.value)


def test_a_folder_without_data_is_said(tmp_path):
    with pytest.raises(DataError, match="holds no data set and none of the files read here"):
        read_splits(TaskConfig(source=str(tmp_path)))


def test_a_hub_name_without_a_hub_is_said(monkeypatch):
    import datasets

    def refuse(name, subset):
        raise ConnectionError(f"no network for {name} {subset}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match="no file or folder 'owner/name:sub' here, and the hub has not given it: no network"
    ):
        read_splits(TaskConfig(source="owner/name:sub"))


def test_the_hub_is_read_with_its_splits(monkeypatch):
    import datasets

    hub_data = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"text": name, "label": "x"}]) for name in ("train", "validation", "test")}
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset: hub_data if (name, subset) == ("o/n", None) else None
    )
    splits = read_splits(TaskConfig(source="o/n"))
    assert (texts(splits.train), texts(splits.validation), texts(splits.test)) == (["train"], ["validation"], ["test"])


def test_reading_a_csv_file_does_not_import_datasets(tmp_path):
    code = "import sys; from softprompts.data import sources as s; s.read_file(s.Path(sys.argv[1]))"
    code += "; print('datasets' in sys.modules)"
    source = Path(__file__).parent.parent / "src"
    done = subprocess.run(
        [sys.executable, "-c", code, table(tmp_path / "d.csv")],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


# Packaged sets


def test_a_packaged_set_fills_in_what_is_left_open():
    dialogue = with_packaged_defaults(TaskConfig(source="dialogue"))
    assert (dialogue.kind, dialogue.label, dialogue.template) == ("generation", "reply", "A: {prompt}\nB:")
    configured = with_packaged_defaults(TaskConfig(source="trec", template="{text} =", verbalizer={"human": "who"}))
    assert (configured.template, configured.verbalizer) == ("{text} =", {"human": "who"})
    assert with_packaged_defaults(TaskConfig(source="dialogue", label="prompt")).label == "prompt"
    assert with_packaged_defaults(TaskConfig(source="x.csv")).kind == "label"


def test_packaged_answers_are_single_distinct_words():
    for name, dataset in PACKAGED.items():
        words = list((dataset.verbalizer or {}).values())
        assert len(set(words)) == len(words), name
        assert all(word.isalpha() and word.islower() for word in words), name


COUNTS = {  # rows without exact repetitions, and of the largest class
    "trec": (5381, 1245), "trec-fine": (5382, 956), "sms-spam": (4512, 3955), "movies": (10070, 5075),
    "products": (2977, 1744), "tweets": (3432, 2345), "editorials": (2931, 1756), "dialogue": (63825, 0),
    "bbc": (2125, 503), "brand-tweets": (37282, 15977), "sarcasm": (28498, 14950), "disaster": (7520, 4315),
}  # fmt: skip
BIG = {
    "vitaminc": (54668, 27242), "presuppositions": (732, 306), "intents": (693, 122), "fever": (6527, 3267),
    "strategyqa": (2289, 1219),
}  # fmt: skip


def unique(name: str) -> list[tuple[str, ...]]:
    rows_by_split = read_rows(name)
    return list({tuple(" ".join(v.split()) for v in row.values()) for part in rows_by_split.values() for row in part})


@pytest.mark.assets
@pytest.mark.parametrize("name", COUNTS)
def test_packaged_counts(name):
    cells = unique(name)
    assert len(cells) == COUNTS[name][0]
    if PACKAGED[name].kind == "label":
        labels = Counter(row[-1] for row in cells)
        assert labels.most_common(1)[0][1] == COUNTS[name][1]
        assert set(labels) == set(PACKAGED[name].verbalizer)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_packaged_counts_of_the_big_group(name):
    from softprompts.errors import AssetError

    try:
        cells = unique(name)
    except AssetError as error:
        pytest.skip(str(error))
    labels = Counter(row[-1] for row in cells)
    assert (len(cells), labels.most_common(1)[0][1]) == BIG[name]
    assert set(labels) == set(PACKAGED[name].verbalizer)


@pytest.mark.assets
def test_packaged_official_splits():
    sizes = {name: {k: len(v) for k, v in read_rows(name).items()} for name in ("reuters8", "newsgroups", "wikitext-2")}
    assert sizes["reuters8"] == {"train": 5485, "test": 2189}
    assert sizes["newsgroups"] == {"train": 11293, "test": 7528}
    assert sizes["wikitext-2"] == {"train": 17556, "validation": 1841, "test": 2185}
    task = load_task(TaskConfig(source="reuters8"))
    assert len(task.test) == 2189
    assert len({text_key(row, ("text",)) for row in task.train} & {text_key(row, ("text",)) for row in task.test}) == 0


@pytest.mark.assets
def test_packaged_trec():
    task = load_task(TaskConfig(source="trec", split=SplitConfig(shots=8)))
    assert (len(task.train), len(task.validation), len(task.test)) == (48, 48, 538)
    assert task.template.verbalizer["human"] == "human"
    assert task.notes[0] == "train: 10071 exact duplicates left out"
