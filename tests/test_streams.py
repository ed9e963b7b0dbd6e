"""Files read row by row: the same rows and the same complaints as when they are read whole, and never far ahead."""

import itertools
import json

import pytest

from softprompts.data.sources import read_file, stream_rows
from softprompts.errors import DataError

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


def test_parquet_and_json(tmp_path):
    import datasets

    rows = [{"text": f"t{i}", "label": i % 2} for i in range(1300)]
    made = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    made.to_parquet(str(tmp_path / "a.parquet"))
    found = list(stream_rows(tmp_path / "a.parquet"))
    assert found == [{"text": f"t{i}", "label": ("no", "yes")[i % 2]} for i in range(1300)]
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
def test_a_broken_row_is_named_once_those_before_it_are_read(tmp_path, name, content, before):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as whole:
        read_file(tmp_path / name)
    rows = stream_rows(tmp_path / name)
    assert [row["text"] for row in itertools.islice(rows, before)] == ["a", "b"][:before]
    with pytest.raises(DataError) as one:
        next(rows)
    assert str(one.value) == str(whole.value)
    assert f"{tmp_path / name}:" in str(one.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b""), ("b.csv", b"text,label\n"), ("c.jsonl", b"\n\n"), ("d.txt", b"x"), ("e.parquet", b"PAR0"),
     ("g.csv", b"a;b\n1;2\n")],
)  # fmt: skip
def test_what_is_no_file_of_rows_is_refused_at_once(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as whole:
        read_file(tmp_path / name)
    with pytest.raises(DataError) as one:
        stream_rows(tmp_path / name)
    said = str(whole.value)
    assert str(one.value)[: said.find("Could")] == said[: said.find("Could")]  # pyarrow's words differ from there on
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
