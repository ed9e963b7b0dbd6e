"""The page and the results file: whole, self-contained, escaped, and with the figures they were given."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from softprompts.artifacts import io
from softprompts.errors import ArtifactError, ConfigError
from softprompts.evaluation.metrics import confusion, per_class, score
from softprompts.evaluation.page import write_page, write_results
from softprompts.evaluation.plots import COLORS, Line, heatmap, interval_plot, line_plot, smooth, thin

VOID = {"meta", "br", "hr", "img", "link", "input"}
LABELS = ["ABBR", "DESC", "HUM"]
GOLDS = ["ABBR", "DESC", "HUM", "HUM", "DESC", "HUM"] * 20
GUESSES = ["ABBR", "DESC", "HUM", "DESC", None, "HUM"] * 20


class Page(HTMLParser):
    """What a test asks of a page: its tags with attributes, its text, and that every tag is closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.numbers = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "data":
            self.numbers.append(dict(attributes)["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def results():
    names = ("accuracy", "f1-macro")
    scores = {name: score(name, GUESSES, GOLDS) for name in names}
    before = {name: score(name, GUESSES[::-1], GOLDS) for name in names}
    steps = range(1, 101)
    return {
        "format": 1,
        "title": "trec with <tiny> & co",
        "task": "trec",
        "created": "2025-06-01T12:30:00+00:00",
        "summary": {
            "before": before["accuracy"],
            "after": scores["accuracy"],
            "metric": "accuracy",
            "steps": 100,
            "seconds": 180.2,
            "trainable": 11520,
            "tokens_per_second": 1234.5,
        },
        "curve": [
            {"step": s, "loss": 3 / s, "rate": 0.01 * s, "rms_ratio": 1 + s / 1e3, "tokens_per_second": s}
            for s in steps
        ],
        "validation": [{"step": 50, "value": 0.5}, {"step": 100, "value": 0.625}],
        "scores": scores,
        "scores_before": before,
        "per_class": per_class(GUESSES, GOLDS, LABELS),
        "confusion": {"labels": LABELS, "matrix": confusion(GUESSES, GOLDS, LABELS)},
        "examples": [
            {"input": "<script>alert('x')</script>", "gold": "HUM", "before": None, "after": "HUM", "correct": True},
            *({"input": f"row {at}", "gold": "HUM", "after": "DESC", "correct": False} for at in range(24)),
        ],
        "nearest_words": [{"row": 0, "norm": 1.25, "words": [["<b>", 0.5], ["who", 0.25]]}],
        "rows": {"train": 4000, "validation": 500, "test": 120},
        "config": {"prompt": {"num_virtual_tokens": 20, "init": {"kind": "words"}}, "names": ["a", "b"]},
        "seeds": {"init": 0},
        "versions": {"softprompts": "0.1.0"},
        "warnings": ["12 rows were cut <here>"],
        "next": ['softprompts predict runs/trec --text "who ?"'],
        "something later": {"is": "ignored"},
    }


@pytest.fixture(scope="module")
def text(results, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "run.html", results).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_comes_from_elsewhere(page, text):
    bare = re.sub(r'href="#|url\(#', "", text)  # within the page
    for outside in ("http://", "https://", "src=", "href=", "<link", "@import", "url(", "<script"):
        assert outside not in bare
    policy = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_what_users_wrote_is_escaped(page, text):
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert not page.of("script")
    assert not page.of("b")
    assert "<script>alert('x')</script>" in page.text
    assert "trec with <tiny> & co" in page.text


def test_it_is_a_whole_and_accessible_page(page):
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("title")) > 1  # the page's own, and those of the cells and dots of the plots
    assert all(heading.get("scope") in ("col", "row") for heading in page.of("th"))
    assert all("aria-label" in box for _, box in page.tags if box.get("role") in ("img", "region"))
    titles = {piece.strip() for piece in page.text}
    for section in ("Training", "Scores", "Labels", "Examples", "Nearest words", "Next", "The run", "Notes"):
        assert section in titles


def test_the_plots_are_there_and_say_their_figures(page, results):
    said = [svg["aria-label"] for svg in page.of("svg")]
    assert len(said) == 7
    assert said[0] == "Loss from step 1 to 100: first 3, last 0.03, lowest 0.03, highest 3"
    assert said[1] == "Validation accuracy from step 50 to 100: first 0.5, last 0.625, lowest 0.5, highest 0.625"
    assert said[2].startswith("Size of the prompt, rms(P) / rms(E) from step 1 to 100: first 1.001, last 1.1")
    assert said[3].startswith("Learning rate from step 1 to 100: first 0.01, last 1")
    assert said[4] == "Tokens per second from step 1 to 100: first 1, last 100, lowest 1, highest 100"
    after = results["scores"]["accuracy"]
    assert f"accuracy after {after.value:.3f} ({after.low:.3f} to {after.high:.3f})" in said[5]
    assert said[6] == "Confusion matrix of 3 labels: 80 of 120 predictions on the diagonal"
    assert "nan" not in " ".join(path["d"] for path in page.of("path"))


def test_the_plots_take_the_page_for_what_it_is(page, text):
    """No id twice, no link to nowhere, no color or font or style of matplotlib's own."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    links = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert set(links) == set(ids)
    plots = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}|<style|<metadata|xmlns|<!", plots)
    assert "svg text { font-family: inherit !important;" in text
    used = set(re.findall(r"var\((--[a-z]+)\)", plots))
    assert used == {f"--{name}" for name in COLORS}
    assert all(f"{name}:" in text for name in used)


def test_the_figures_are_those_of_the_results(page, text, results):
    numbers = set(page.numbers)
    for scores in (results["scores"], results["scores_before"]):
        assert {repr(found.value) for found in scores.values()} <= numbers
    for found in results["scores"].values():
        assert {repr(found.low), repr(found.high)} <= numbers
    for one in results["per_class"]:
        assert {repr(one.precision), repr(one.recall), repr(one.f1), repr(one.support)} <= numbers
    assert {"11520", "1234.5", "180.2", "4000", "1.25", "0.5", "0.25"} <= numbers
    shown = "".join(page.text)
    assert "11,520" in shown
    assert "3 min 0 s" in shown
    assert f"{results['scores']['accuracy'].value:.3f}" in shown
    assert "prompt.init.kind" in shown
    assert '["a", "b"]' in shown


def cells(plot):
    """The counts that a heatmap shows, and what the pointer shows on each."""
    root = ElementTree.fromstring(plot.svg)
    counts = [int(text.text) for text in root.iter("text") if text.text.isdigit()]
    return counts, [title.text for title in root.iter("title")]


def test_the_heatmap_holds_every_count(results):
    matrix = results["confusion"]["matrix"]
    counts, tips = cells(heatmap(LABELS, matrix.tolist()))
    assert counts == [int(tip.split(": ")[1]) for tip in tips] == matrix.ravel().tolist()
    assert tips[3] == f"gold ABBR, predicted no label: {matrix[0, 3]}"
    assert cells(heatmap(["yes"], [[5, 0]])) == ([5], ["gold yes, predicted yes: 5"])  # nothing illegal: no column
    assert cells(heatmap(["yes", "no"], [[5], [3]]))[0] == [5, 3]  # all predicted alike
    big = cells(heatmap([0, 1], [[1_234_567, 0], [2, 3]]))[1]
    assert big[0] == "gold 0, predicted 0: 1234567"


@pytest.mark.parametrize(
    "label", ["$5 or $x^$", "日本語のラベル", "<b>&amp;", "#00000d", "a\x00b\nc", "\\frac", "x" * 400, ""]
)
def test_any_label_can_be_drawn(label):
    svg = heatmap([label, "b"], [[1, 2], [3, 4]]).svg
    shown = label if len(label) < 15 else f"{label[:7]}…{label[-6:]}"
    assert shown.replace("\x00", " ").replace("\n", " ").strip() in Page(svg).text or not label


def test_plots_are_the_same_text_every_time_and_leave_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    matplotlib.rcParams["lines.linewidth"] = 9  # whatever the user's file says
    line = Line("a", [(1, 2.0), (2, 3.0)], dots=True)
    first = line_plot("One", [line])
    matplotlib.rcParams.update(before)
    assert line_plot("One", [line]) == first
    assert dict(matplotlib.rcParams) == before
    assert [title for title in Page(first.svg).text if title.startswith("step 1")] == ["step 1: 2"]


def test_matplotlib_waits_until_something_is_drawn(tmp_path):
    least = {"title": "t", "task": "x"}
    one, two = (least | {"curve": [{"step": s, "loss": 2} for s in range(n)]} for n in (1, 2))
    path = str(tmp_path / "p.html")
    code = f"""
import sys
from softprompts.evaluation.page import write_page
assert "matplotlib" not in sys.modules
write_page({path!r}, {one!r})
assert "matplotlib" not in sys.modules
write_page({path!r}, {two!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"], check=True)


def test_many_examples_are_folded(page):
    assert "5 more" in "".join(page.text)
    assert "no legal answer" in page.text


def test_the_least_page(tmp_path):
    page = Page(write_page(tmp_path / "least.html", {"title": "t", "task": "trec"}).read_text(encoding="utf-8"))
    assert not page.of("section")
    assert not page.of("svg")
    assert [tag for tag, _ in page.tags].count("h1") == 1


@pytest.mark.parametrize("key", ["title", "task"])
def test_title_and_task_are_needed(tmp_path, key):
    with pytest.raises(ConfigError, match=f"no '{key}'"):
        write_page(tmp_path / "p.html", {"title": "t", "task": "x"} | {key: ""})
    with pytest.raises(ConfigError, match="format 2"):
        write_page(tmp_path / "p.html", {"title": "t", "task": "x", "format": 2})
    assert not list(tmp_path.iterdir())


def test_every_section_stands_alone(tmp_path, results):
    for key in results:
        one = {"title": "t", "task": "x", key: results[key]}
        Page(write_page(tmp_path / "p.html", one).read_text(encoding="utf-8"))


def test_undefined_scores_are_shown_as_such(tmp_path):
    found = score("pearson", [1.0, 1.0], [1.0, 2.0])
    results = {
        "title": "t",
        "task": "x",
        "summary": {"after": found, "metric": "pearson"},
        "scores": {"pearson": found},
    }
    shown = "".join(Page(write_page(tmp_path / "p.html", results).read_text(encoding="utf-8")).text)
    assert "the predictions are all 1" in shown
    assert "nan" not in shown.rpartition("}")[2]  # behind the style sheet
    assert "–" in shown


def test_many_labels_become_a_table(tmp_path):
    labels = [f"label {at}" for at in range(60)]
    matrix = np.eye(60, 61, dtype=int) * 5
    matrix[3, 7], matrix[4, 60] = 9, 2
    results = {"title": "t", "task": "x", "confusion": {"labels": labels, "matrix": matrix}}
    page = Page(write_page(tmp_path / "p.html", results).read_text(encoding="utf-8"))
    assert not page.of("svg")
    assert "Most frequent confusions" in page.text
    assert page.numbers == ["9", "2"]


def test_long_runs_stay_small(tmp_path):
    curve = [{"step": step, "loss": 1 / step} for step in range(1, 50_001)]
    path = write_page(tmp_path / "p.html", {"title": "t", "task": "x", "curve": curve})
    assert path.stat().st_size < 60_000
    points = thin([(float(step), 2.0) for step in range(50_000)])
    assert len(points) <= 500
    assert all(y == 2.0 for _, y in smooth(points))


@pytest.mark.parametrize(
    "values",
    [(0, 1), (1, 1), (0, 0), (-3, 5), (1e-9, 3e-9), (1, 1 + 1e-15), (1.0001, 1.0003), (1, 50_000), (1e12, 1e13)],
)
def test_any_range_has_ticks_that_differ(values):
    root = ElementTree.fromstring(line_plot("Some", [Line("a", list(enumerate(values, 1)))]).svg)
    ticks = [text.text for text in root.iter("text") if text.text != "step"]
    across = [tick for tick in ticks if tick in ("1", "2")]
    assert len(ticks) - len(across) >= 2
    assert len(set(ticks)) >= len(ticks) - len(across)


def test_scores_without_bounds_are_dots_alone():
    assert interval_plot({"a": {"value": None}}, {}) is None
    plot = interval_plot({"a": {"value": 0.5, "low": None, "high": None}}, {"a": {"value": None}})
    assert 'aria-label="a after 0.500"' in plot.svg
    assert "before" not in plot.svg
    assert [key.name for key in plot.legend] == ["after"]
    assert "0.500" in Page(plot.svg).text


def test_tables_escape_align_and_dash(tmp_path):
    rows = [["<i>", 1200, {"mean": 0.5, "sd": 0.25, "n": 2}], ["<em>x</em>", None, {"mean": 0.5, "sd": None, "n": 1}]]
    study_table = {"title": "Some & all", "columns": ["name & co", "count", "score"], "rows": rows}
    results = {"title": "t", "task": "x", "tables": [study_table]}
    text = write_page(tmp_path / "p.html", results).read_text(encoding="utf-8")
    assert "<h2>Some &amp; all</h2>" in text
    assert 'aria-label="name &amp; co, count, score"' in text
    assert '<th scope="col">name &amp; co</th><th scope="col" class="figure">count</th>' in text
    assert '<th scope="row">&lt;i&gt;</th><td class="figure"><data value="1200">1,200</data></td>' in text
    assert '<td class="figure"><data value="0.5">0.500</data> ± 0.250<small>2 runs</small></td>' in text
    assert '<th scope="row">&lt;em&gt;x&lt;/em&gt;</th><td class="figure"><data value="">–</data></td>' in text
    assert '<td class="figure"><data value="0.5">0.500</data><small>1 run</small></td>' in text


@pytest.mark.parametrize("place", ["title", "task", "warnings", "next", "label", "column", "metric", "run"])
def test_every_text_of_the_results_is_escaped(tmp_path, place):
    text = """<img src=x onerror="alert('x')">&amp;"""
    results = {"title": "t", "task": "x"} | {
        "title": {"title": text},
        "task": {"task": text},
        "warnings": {"warnings": [text]},
        "next": {"next": [text]},
        "label": {"confusion": {"labels": [text, "b"], "matrix": [[1, 2, 0], [3, 4, 0]]}},
        "column": {"tables": [{"title": text, "columns": [text, "b"], "rows": [[text, 1.0]]}]},
        "metric": {"scores": {text: {"value": 0.5, "n": 3, "illegal": 0, "note": text}}},
        "run": {"runs": [{"name": text, "task": text, "differs": {text: text}, "metric": text}]},
    }[place]
    page = Page(write_page(tmp_path / "p.html", results).read_text(encoding="utf-8"))
    assert not page.of("img")
    assert place == "label" or any(text in piece for piece in page.text)


@pytest.mark.parametrize("write", [write_page, write_results])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, write):
    path = tmp_path / "out"
    write(path, {"title": "old", "task": "x"})
    old = path.read_bytes()

    def fail(target, data):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(io, "_write_through", fail)
    with pytest.raises(ArtifactError, match="cannot be written: disk full"):
        write(path, {"title": "new", "task": "x"})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_results_come_back(tmp_path, results):
    path = write_results(tmp_path / "deep" / "results.json", results)
    back = json.loads(path.read_text(encoding="utf-8"))
    assert back["scores"]["accuracy"]["value"] == results["scores"]["accuracy"].value
    assert back["confusion"]["matrix"] == results["confusion"]["matrix"].tolist()
    assert back["title"] == results["title"]
    again = write_page(tmp_path / "a.html", back).read_bytes()
    assert again == write_page(tmp_path / "b.html", results).read_bytes()  # the page of the file is that of the run


def test_nan_becomes_null_and_strangers_are_named(tmp_path):
    path = write_results(
        tmp_path / "r.json", {"a": [math.nan, np.float32(1.5), math.inf], "p": Path("x"), "s": {"b", "a"}}
    )
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [None, 1.5, None], "p": "x", "s": ["a", "b"]}
    with pytest.raises(TypeError, match=r"results\.a\[1\] is a object"):
        write_results(tmp_path / "r.json", {"a": [1, object()]})
