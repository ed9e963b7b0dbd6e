"""Sums of trained prompts as people write them: read back whatever is written, and every message for what is no sum."""

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

import rows
from artifacts import D, P, bits, trained
from softprompts.artifacts import artifact, collection, vectors
from softprompts.artifacts.vectors import (
    evaluate_expression,
    locate_prompt,
    parse_expression,
    read_expression,
    task_vector,
)
from softprompts.errors import ArtifactError, VectorError

PROMPTS = tuple(trained(rows.random(seed, P, D), rows.random(9, P, D), task=f"t{seed}") for seed in range(3))

# Sums rendered to text


def numbers() -> st.SearchStrategy[str]:
    """Numbers as people write them: 2, 0.5, .5, 2., 1e-3."""
    return st.from_regex(r"\A([0-9]{1,3}(\.[0-9]{0,3})?|\.[0-9]{1,3})([eE][+-]?[0-9])?\Z")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def names() -> st.SearchStrategy[str]:
    """Words and paths without quotation marks, hyphens and digits among them; and anything else within them."""
    bare = st.text("ab7e.-+/_=:~ü", min_size=1, max_size=6)
    bare = bare.filter(lambda name: name[0] not in "+-" and not is_number(name))
    strange = st.text(st.characters(blacklist_characters='"', blacklist_categories=("Cs",)), min_size=1, max_size=6)
    return bare | strange.map('"{}"'.format)


def spaces(least: int = 0) -> st.SearchStrategy[str]:
    return st.text(" \t\n", min_size=least, max_size=2)


@st.composite
def products(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> tuple[str, dict[str, Fraction]]:
    """Numbers times a name or a bracket."""
    text, by = "", Fraction(1)
    for number in draw(st.lists(numbers(), max_size=2)):
        text += number + draw(spaces()) + "*" + draw(spaces())
        by *= Fraction(Decimal(number))
    if draw(st.booleans()):
        name = draw(names())
        return text + name, {name.strip('"') if name.startswith('"') else name: by}
    bracket, within = draw(inner)
    return f"{text}({draw(spaces())}{bracket}{draw(spaces())})", {name: by * share for name, share in within.items()}


@st.composite
def sums(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> tuple[str, dict[str, Fraction]]:
    """A sum's text, and by what each name in it is multiplied, in the order in which they appear."""
    text, total = draw(spaces()), dict[str, Fraction]()
    for place, (product, within) in enumerate(draw(st.lists(products(inner), min_size=1, max_size=3))):
        sign = draw(st.sampled_from(("+", "-") if place else ("", "+", "-")))
        text += (draw(spaces(1)) if place else "") + sign + (draw(spaces()) if sign else "") + product
        for name, share in within.items():
            total[name] = total.get(name, Fraction(0)) + (-share if sign == "-" else share)
    return text + draw(spaces()), total


NAMED = names().map(lambda name: (name, {name.strip('"') if name.startswith('"') else name: Fraction(1)}))


@settings(deadline=None, max_examples=60)
@given(st.recursive(NAMED, sums, max_leaves=6).filter(lambda found: found[0].strip()))
def test_whatever_is_written_is_read_back(found: tuple[str, Mapping[str, Fraction]]) -> None:
    text, wanted = found
    assert parse_expression(text) == wanted
    assert list(parse_expression(text)) == list(wanted), "in the order they appear"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("movies", {"movies": 1}),
        ("movies + 0.5*tweets - sms", {"movies": 1, "tweets": 0.5, "sms": -1}),
        ("0.1*a + 0.2*a", {"a": Fraction(3, 10)}),
        ("a - a", {"a": 0}),
        ("-a", {"a": -1}),
        ("- 2*a", {"a": -2}),
        ("+a -b", {"a": 1, "b": -1}),
        ("a -2*b", {"a": 1, "b": -2}),
        ("-(a - (b - c))", {"a": -1, "b": 1, "c": -1}),
        ("0.5*(a + 3 * (b))-c", {"a": 0.5, "b": 1.5, "c": -1}),
        ("2*3*a", {"a": 6}),
        ("1e-3*a", {"a": Fraction(1, 1000)}),
        ("task-1 + task-2-b", {"task-1": 1, "task-2-b": 1}),
        ("a-b", {"a-b": 1}),
        ("a+b", {"a+b": 1}),
        ("runs/a-1/prompt - ./b", {"runs/a-1/prompt": 1, "./b": -1}),
        ("20newsgroups", {"20newsgroups": 1}),
        ("2*20newsgroups", {"20newsgroups": 2}),
        ("1.5.2", {"1.5.2": 1}),
        ('"my runs/a" + 2*"b (1)"', {"my runs/a": 1, "b (1)": 2}),
        ('"2" - "a*b"', {"2": 1, "a*b": -1}),
    ],
)
def test_examples(text: str, wanted: dict[str, Any]) -> None:
    assert parse_expression(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' names no prompt; write a sum such as movies + 0.5*tweets"),
        (" \n", "names no prompt; write a sum such as movies + 0.5*tweets"),
        ("a b", "'a b': after 'a' there should be `+` or `-`, found 'b'"),
        ("a+ b", "'a+ b': after 'a+' there should be `+` or `-`, found 'b'"),
        ("a +", "'a +': after 'a +' there should be a name, a number or `(`, found the end"),
        ("a + + b", "after 'a +' there should be a name, a number or `(`, found '+'"),
        ("a + -b", "after 'a +' there should be a name, a number or `(`, found '-'"),
        ("2", "'2': after '2' there should be `*` and a name, found the end"),
        ("a + 2", "after 'a + 2' there should be `*` and a name, found the end"),
        ("2 a", "after '2' there should be `*` and a name, found 'a'"),
        ("2*", "after '2*' there should be a name, a number or `(`, found the end"),
        ("2*-a", "after '2*' there should be a name, a number or `(`, found '-'"),
        ("a*2", "'a*2': after 'a' there should be `+` or `-`, found '*'"),
        ("a*b", "after 'a' there should be `+` or `-`, found '*'"),
        ("(a + b", "after '(a + b' there should be `)`, found the end"),
        ("(a b)", "after '(a' there should be `)`, found 'b'"),
        ("a + b)", "after 'a + b' there should be `+` or `-`, found ')'"),
        ("()", "after '(' there should be a name, a number or `(`, found ')'"),
        ("a (b)", "after 'a' there should be `+` or `-`, found '('"),
        ('a + "b', "'a + \"b': this cannot be read: \"b"),
        ('""', '\'""\': this cannot be read: ""'),
        ("1e999*a", "1e999 is too large or too small"),
        ("a - 1e-999999999*b", "1e-999999999 is too large or too small"),
        ("1e999999999*a", "1e999999999 is too large or too small"),
    ],
)
def test_what_is_no_sum(text: str, message: str) -> None:
    """The message shows the place."""
    with pytest.raises(VectorError, match=re.escape(message)):
        parse_expression(text)


@settings(deadline=None, max_examples=60)
@given(st.text('ab2.*+-() "e', max_size=12))
@case("2*2")
@case("((")
def test_any_text_is_a_sum_or_refused(text: str) -> None:
    """Nothing else happens, and what is read is named in the text."""
    found, told = dict[str, Fraction](), ""
    try:
        found = parse_expression(text)
    except VectorError as error:
        told = str(error)
    assert bool(found) != told.startswith(f"'{text}'")
    assert all(name in text for name in found)


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(
        st.text("a2.+-*() e", min_size=1, max_size=5).filter(str.strip), min_size=2, max_size=2, unique=True
    ),
    eighths=st.lists(st.integers(-40, 40).filter(bool), min_size=2, max_size=2),
)
def test_a_vectors_name_is_read_back(names: list[str], eighths: list[int]) -> None:
    """Whatever the prompts are called; six digits of a coefficient are shown."""
    by = {name: Fraction(eighth, 8) for name, eighth in zip(names, eighths, strict=True)}
    one, other = (task_vector(found, name) * by[name] for found, name in zip(PROMPTS, names, strict=False))
    assert parse_expression((one + other).name) == by


# What a sum stands for


def test_weigh_finds_each_name_once_and_adds() -> None:
    asked = []

    def find(name: str) -> vectors.Vector:
        asked.append(name)
        return task_vector(PROMPTS["abc".index(name)], name)

    found = evaluate_expression("2*(a - b) + c - a + b", find)
    assert asked == ["a", "b", "c"]
    a, b, c = (task_vector(one) for one in PROMPTS)
    assert found.key == (a - b + c).key
    assert bits(found.value) == bits((a - b + c).value)
    assert evaluate_expression("a - a", find).summands == ()
    assert evaluate_expression("a + b", find).key == evaluate_expression("b + a", find).key


def test_weigh_refuses_coefficients_that_no_float_holds() -> None:
    with pytest.raises(ArtifactError, match="give a finite number"):
        evaluate_expression("1e200*1e200*a", lambda name: task_vector(PROMPTS[0]))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with trained prompts in all the places that a name may mean."""
    monkeypatch.chdir(tmp_path)
    for seed, place in enumerate(("runs/movies/prompt", "exported", "runs/plain")):
        artifact.save(PROMPTS[seed], tmp_path / place)
    return tmp_path


def test_locate(here: Path) -> None:
    """A run by its name, a run's directory, an artifact's directory; what stands here goes before `runs`."""
    for name, place in (
        ("movies", "runs/movies/prompt"),
        ("runs/movies", "runs/movies/prompt"),
        ("runs/movies/prompt", "runs/movies/prompt"),
        ("exported", "exported"),
        ("./exported", "exported"),
        ("plain", "runs/plain"),
        (str(here / "exported"), str(here / "exported")),
        (str(here / "runs/movies"), str(here / "runs/movies/prompt")),
    ):
        assert locate_prompt(name) == Path(place), name
    artifact.save(PROMPTS[1], here / "runs/plain/prompt")
    assert locate_prompt("plain") == Path("runs/plain/prompt"), "as train writes it"
    for place in ("movies/prompt", "plain", "plain/prompt"):
        artifact.save(PROMPTS[1], here / place)
    assert locate_prompt("movies") == Path("movies/prompt")
    assert locate_prompt("plain") == Path("plain")
    for name in ("softprompts.json", "softprompts.safetensors"):
        (here / "exported" / name).unlink()
    assert locate_prompt("exported") == Path("exported"), "PEFT's files alone"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tweets", "no trained prompt 'tweets' (looked for tweets, tweets/prompt, runs/tweets/prompt, runs/tweets)"),
        ("movies+tweets", "; if it is a sum, write spaces around + and -: movies + tweets"),
        ("movies-2", "; if it is a sum, write spaces around + and -: movies - 2"),
        ("runs", "no trained prompt 'runs'"),
        ("a" * 300, "no trained prompt 'aaa"),
        ("nul\0", "no trained prompt 'nul"),
    ],
)
def test_names_of_no_prompt(here: Path, name: str, message: str) -> None:
    with pytest.raises(VectorError, match=re.escape(message)) as caught:
        locate_prompt(name)
    if "/" in name or not re.search("[+-]", name):
        assert "write spaces" not in str(caught.value)


def test_a_path_that_is_not_there_is_told_once(here: Path) -> None:
    where = here / "no-where"
    with pytest.raises(VectorError) as caught:
        locate_prompt(str(where))
    assert str(caught.value) == f"no trained prompt '{where}' (looked for {where}, {where / 'prompt'})"


def test_a_run_of_several_tasks_is_no_one_prompt(here: Path) -> None:
    """The message says how to name one of them."""
    for seed, task in enumerate(("mnli", "sst2")):
        artifact.save(PROMPTS[seed], here / "runs/joint/prompt" / task)
    collection.write_index(here / "runs/joint/prompt", collection.CollectionIndex(("mnli", "sst2")), None)
    with pytest.raises(
        VectorError, match="joint holds 2 prompts; name one: runs/joint/prompt/mnli, runs/joint/prompt/sst2"
    ):
        locate_prompt("joint")
    assert locate_prompt("runs/joint/prompt/sst2") == Path("runs/joint/prompt/sst2")
    assert locate_prompt("joint/prompt/sst2") == Path("runs/joint/prompt/sst2")


def test_read(here: Path) -> None:
    found = read_expression("2*movies - exported + plain")
    a, b, c = (task_vector(one) for one in PROMPTS)
    assert found.key == (2 * a - b + c).key
    assert bits(found.value) == bits((2 * a - b + c).value)
    assert parse_expression(found.name) == {"movies": 2, "exported": -1, "plain": 1}
    assert found.parents == tuple(sorted(one.digest for one in PROMPTS))
    assert read_expression("movies - runs/movies/prompt").summands == (), "one prompt by two of its names"
    with pytest.raises(VectorError, match="no trained prompt 'tweets'"):
        read_expression("movies + tweets")
    with pytest.raises(VectorError, match="after 'movies'"):
        read_expression("movies tweets")
    assert issubclass(VectorError, ArtifactError)
