"""The measures of the house against the limits of the design, and the measures themselves on small sources."""

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

import house
from house import LIMITS, Checkout, Limit, Measurement, Module

PENDING: frozenset[str] = frozenset()
"""Limits that the rebuild has not reached yet; a test fails as soon as one holds and is still in this set."""


def limit_params() -> list[object]:
    """The names of all limits; those that are pending are expected to fail."""
    params = []
    for name in LIMITS:
        pending = pytest.mark.xfail(strict=True, raises=AssertionError, reason="the rebuild has not reached this limit")
        params.append(pytest.param(name, marks=[pending] if name in PENDING else []))
    return params


@pytest.fixture(scope="module")
def checkout() -> Checkout:
    """The checkout that the tests belong to."""
    return Checkout.read(house.ROOT)


@pytest.mark.parametrize("name", limit_params())
def test_limit_holds(name: str, checkout: Checkout) -> None:
    limit = LIMITS[name]
    value, places = limit.measure(checkout)
    shown = "\n".join(places)
    assert limit.holds(value), f"{name}: {value:,.5g}, limit {limit}\n{shown}"


def test_pending_limits_are_limits() -> None:
    assert set(LIMITS) >= PENDING


def test_the_model_imports_its_necessary_packages() -> None:
    assert house.imported_packages(house.ROOT).with_model >= house.NECESSARY


def test_the_instrument_keeps_the_limits_of_code(tmp_path: Path) -> None:
    modules = {}
    for name in ("house", "test_house", "test_layers"):
        path = house.ROOT / "tests" / f"{name}.py"
        modules[name] = Module.parse(name, path.read_text(encoding="utf-8"))
    checkout = Checkout(tmp_path, modules)
    assert house.measure_content_free_names(checkout).places == []
    assert house.measure_double_comprehensions(checkout).places == []
    assert house.measure_comprehensions(checkout).value < 25


@pytest.mark.parametrize(
    ("relation", "value", "holds"),
    [("at most", 4, True), ("at most", 5, False), ("under", 4, False), ("exactly", 4, True), ("exactly", 3, False)],
)
def test_limit_compares_the_value(relation: str, value: float, holds: bool) -> None:
    assert Limit(house.measure_code_lines, relation, 4).holds(value) is holds


def small(sources: Mapping[str, str], root: Path = Path()) -> Checkout:
    """A checkout of these modules."""
    modules = {}
    for name, text in sources.items():
        modules[name] = Module.parse(name, textwrap.dedent(text))
    return Checkout(root, modules)


GRAPH = {
    "types": "",
    "methods": "from softprompts.methods.registry import build",
    "methods.registry": "from softprompts.types import Batch",
    "model": "from softprompts import __version__, methods, types",
    "training": "from softprompts.model import Model\nfrom softprompts.methods import build",
    "cli": "def f():\n    import softprompts.training",
}


def test_graph_has_an_arrow_for_each_pair_of_boxes() -> None:
    assert house.box_graph(small(GRAPH).modules) == {
        "types": set(),
        "methods": {"types"},
        "model": {"methods", "types"},
        "training": {"methods", "model"},
        "cli": {"training"},
    }
    assert house.measure_boxes(small(GRAPH)).value == 5
    assert house.measure_arrows(small(GRAPH)).value == 6


def test_floors_are_the_longest_path() -> None:
    assert house.measure_floors(small(GRAPH)).value == 5
    assert house.measure_floors(small({"a": "", "b": ""})).value == 1


def test_boxes_in_a_circle_are_a_floor_each() -> None:
    circle = {**GRAPH, "model": "from softprompts import methods, types, training"}
    assert house.measure_floors(small(circle)).value == 5
    circle["types"] = "from softprompts import cli"
    assert house.measure_floors(small(circle)).value == 5
    circle["top"] = "from softprompts import types"
    assert house.measure_floors(small(circle)).value == 6


def test_modules_with_one_importer_are_named() -> None:
    assert list(house.measure_single_importers(small(GRAPH)).places) == [
        "methods.registry <- methods",
        "model <- training",
        "training <- cli",
    ]


LIBRARY = {
    "methods": "from softprompts.methods.registry import build",
    "methods.registry": "def build(name): ...\ndef find(name): ...",
    "artifacts.artifact": "class Artifact: ...\ndef load(path): return Artifact()",
}


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (
            """
            from softprompts.artifacts.artifact import Artifact, load
            from softprompts import methods
            class Model:
                def load_prompt(self, path):
                    return self._rebuilt(load(path))
                def _rebuilt(self, saved: Artifact):
                    return methods.build(saved.method)
                def add_prompt(self, name):
                    return methods.build(name)
            """,
            ["model.Model.load_prompt"],
        ),
        (
            """
            from softprompts.artifacts import artifact
            from softprompts.methods import build
            def first(path): return build(artifact.load(path).method)
            def second(path):
                saved = artifact.load(path)
                return build(saved.method)
            """,
            ["model.first", "model.second"],
        ),
        (
            """
            from collections.abc import Sequence
            from softprompts.artifacts.artifact import Artifact
            from softprompts.methods.registry import build
            def rebuild(saved: "Sequence[Artifact]"): return build(saved[0].method)
            def rebuild_more(saved: Sequence[Artifact], more: int): return rebuild(saved) or build("b")
            def open_all(paths): return rebuild_more(paths)
            def open_one(path): return rebuild(path)
            """,
            ["model.open_all", "model.open_one"],
        ),
        (
            """
            from softprompts.artifacts import artifact
            from softprompts.methods import build
            def open_artifact(path): return build(artifact.load(path).method)
            def open_directory(paths): return list(map(open_artifact, paths)) or [open_artifact(paths[0])]
            """,
            ["model.open_artifact"],
        ),
    ],
)
def test_ways_to_open_a_prompt_are_named(text: str, places: list[str]) -> None:
    assert house.measure_opening(small({**LIBRARY, "model": text})) == Measurement(len(places), places)


def test_opening_is_not_measured_without_its_functions() -> None:
    with pytest.raises(LookupError, match=r"methods\.registry\.build is gone"):
        house.measure_opening(small({"model": "def f(): ..."}))


def test_ways_to_pack_an_artifact_are_outside_artifacts() -> None:
    packing = "from softprompts.artifacts import artifact\ndef f(): return artifact.Artifact(1)"
    assert house.measure_packing(small({**LIBRARY, "model": packing, "training": packing})).value == 2


def test_training_loops_step_an_optimizer() -> None:
    text = """
    def update(run): run.optimizer.step()
    def again(optim, scheduler):
        for _ in range(3):
            optim.step()
    def other(scheduler, screen):
        scheduler.step()
        screen.step("a", 1)
    """
    assert sorted(house.measure_loops(small({"training": text})).places) == ["training.again", "training.update"]


@pytest.mark.parametrize(
    ("module", "text", "count"),
    [
        ("model", "def f(site): return site.name == 'kv'", 1),
        ("model", "def f(site): return site.name not in ('input', 'decoder')", 1),
        ("model", "def f(site):\n    match site.name:\n        case 'layers': return 1", 1),
        ("model", "def f(side): return 'decoder' != side or 'kv' in {'kv'}", 1),
        ("model", "def f(site): return site.in_cache or site.name == 'kvs'", 0),
        ("injection.sites", "def f(site): return site.name == 'kv'", 0),
        ("config.schema", "def f(site): return site == 'kv'", 0),
    ],
)
def test_comparisons_with_site_names_are_counted(module: str, text: str, count: int) -> None:
    assert house.measure_site_names(small({module: text})).value == count


@pytest.mark.parametrize(
    ("module", "text", "count"),
    [
        ("model", "def f(self): return hasattr(self.method, 'fold')", 1),
        ("model", "def f(name): return getattr(find(name), 'sites', ())", 1),
        ("model", "def f(name):\n    prompt: Any = build(name)\n    return hasattr(prompt, 'size')", 1),
        ("model", "def f(method, name): return getattr(method, name)", 0),
        ("model", "def f(model): return hasattr(model, 'decoder')", 0),
        ("backbone.quantization", "def f(method): return getattr(method, 'value', method)", 0),
    ],
)
def test_probes_of_methods_are_counted(module: str, text: str, count: int) -> None:
    assert house.measure_probes(small({module: text})).value == count


def test_content_free_names_are_a_share_of_all_bindings() -> None:
    text = """
    def f(one, rows):
        found = [row for row in rows]
        return one + found
    """
    measurement = house.measure_content_free_names(small({"model": text}))
    assert measurement.value == 50
    assert list(measurement.places) == ["model:2 one", "model:3 found"]


def test_comprehensions_are_counted() -> None:
    text = """
    rows = [token for row in rows for token in row]
    names = {name: len(name) for name in rows}


    """
    checkout = small({"model": text})
    assert house.measure_double_comprehensions(checkout).value == 1
    assert house.measure_comprehensions(checkout).value == 400


def test_lines_of_code_are_those_without_documentation() -> None:
    text = '''
    """A module.

    Its second paragraph.
    """

    import os  # counts

    LIMIT = 1
    """What the constant is."""


    def f(text: str = """two
    lines""") -> str:
        """One line."""
        # Why.
        return (
            text
        )
    '''
    assert house.measure_code_lines(small({"model": text})).value == 7


def test_dependencies_that_nothing_imports_are_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[project]\n"
        'dependencies = ["torch>=2.6", "PyYAML", "scikit-learn>=1", "rouge-score", "protobuf>=5"]\n'
        "[project.optional-dependencies]\n"
        'retrieval = ["faiss-cpu>=1.12"]\n'
        'test = ["pytest"]\n'
    )
    checkout = small({"model": "import torch\ndef f():\n    import yaml\n    from rouge_score import x"}, tmp_path)
    assert house.measure_unused_dependencies(checkout) == Measurement(2, ["faiss-cpu", "scikit-learn"])


def test_entries_are_counted_without_caches(tmp_path: Path) -> None:
    package = tmp_path / "src" / "softprompts"
    for name in ("__pycache__", "model"):
        (package / name).mkdir(parents=True)
    for name in ("types.py", "py.typed"):
        (package / name).touch()
    assert house.measure_entries(small({}, tmp_path)) == Measurement(2, ["model", "types.py"])


def test_stack_has_each_function_once_and_no_comprehension(tmp_path: Path) -> None:
    path = tmp_path / "loop.py"
    path.write_text(
        "import contextlib\n"
        "@contextlib.contextmanager\n"
        "def entered(watch):\n    watch()\n    yield\n"
        "class Model:\n    def __call__(self, watch): [watch() for _ in range(1)]\n"
        "def step(watch, depth):\n    step(watch, depth - 1) if depth else Model()(watch)\n"
        "def train(watch):\n"
        "    with entered(watch):\n        (lambda: step(watch, 2))()\n"
    )
    namespace: dict[str, object] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    stacks = []
    namespace["train"](lambda: stacks.append(house.functions_on_stack(sys._getframe(), tmp_path)))
    entering = ["loop.py: train"]
    assert stacks == [entering, ["loop.py: train", "loop.py: train.<locals>.<lambda>", "loop.py: step"]]
