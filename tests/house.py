"""The measures of the house: run `python -m tests.house` to print each with its value and its limit.

A measure reads the source text, except two: one trains a tiny model through the command, one imports the library.
`--places WORDS` also prints where the values of the measures with these words in their names come from.
"""

import argparse
import ast
import contextlib
import functools
import io
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

PACKAGE = "softprompts"

SITES = frozenset({"input", "decoder", "layers", "kv"})

CONTENT_FREE = frozenset(
    {"found", "one", "own", "made", "held", "given", "there", "kept", "thing", "things", "stuff"}
    | {"what", "which", "who", "mine"}
)
"""Variable names that do not name the thing."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

BLIND_TO_METHODS = frozenset({"config", "backbone", "data", "assets", "artifacts", "errors", "types"})
"""Packages that may not import methods, so that a `method` in them is another word, such as one of quantization."""

METHOD_VARIABLES = frozenset({"method", "method_class", "kind"})
"""Variables that hold a method or its class wherever a module may import methods."""

BUILD_METHOD = "methods.registry.build"
"""The function that makes a method from its name and options."""

READ_ARTIFACT = "artifacts.artifact.load"
"""The function that reads an artifact from its directory."""

MODULE_OF_DISTRIBUTION = {"scikit-learn": "sklearn", "pyyaml": "yaml", "faiss-cpu": "faiss"}
"""Distributions whose module has another name."""

NEEDED_BY_TRANSFORMERS = frozenset({"sentencepiece", "protobuf"})
"""Distributions that only transformers imports, to convert the sentencepiece models of tokenizers such as T5's."""

HEAVY = frozenset(
    {"matplotlib", "datasets", "sklearn", "scipy", "pandas", "jinja2", "typer", "rich", "peft", "pyarrow"}
)
"""Packages that `from softprompts import SoftPromptModel` must not add to what transformers imports by itself."""

NECESSARY = frozenset({"torch", "transformers", "safetensors", "pydantic"})

WITHOUT_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)
"""Tokens that alone make no line of code."""

RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    "at most": operator.le,
    "under": operator.lt,
    "exactly": operator.eq,
}


class Measurement(NamedTuple):
    """The value of a measure, and one line for each place in the source that counts in it."""

    value: float
    places: Sequence[str] = ()


@dataclass(frozen=True)
class Module:
    """A source file, parsed; `name` is dotted and begins under the package, as in `training.loop`."""

    name: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, name: str, text: str) -> "Module":
        """The module of this name and source text."""
        return cls(name, text, ast.parse(text, name))

    @property
    def box(self) -> str:
        """The entry directly under the package to which the module belongs."""
        return self.name.partition(".")[0]


Modules = Mapping[str, Module]


def read_modules(package: Path) -> Modules:
    """Parse every source file under `package`; the `__init__` of a subpackage has the name of the subpackage."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        name = ".".join(parts)
        modules[name] = Module.parse(name, path.read_text(encoding="utf-8"))
    return modules


class Import(NamedTuple):
    """An import statement's name in full (`from a import b` gives `a.b`), the name that it binds, and its line."""

    name: str
    alias: str
    line: int


def imports_of(module: Module) -> Iterator[Import]:
    """Yield the imports of a module, wherever in the file.

    Raises:
        ValueError: The module imports relatively.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, alias.asname or alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{module.name}:{node.lineno} imports relatively; write `from {PACKAGE}...`")
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", alias.asname or alias.name, node.lineno)


def module_of_import(name: str, modules: Modules) -> str | None:
    """The module of the package that an import runs.

    Args:
        name: An imported name in full, such as `softprompts.training.loop.train`.
        modules: The modules of the package.

    Returns:
        The module's name, such as `training.loop`; `__init__` for a public name of the package. None for another
        package, and for `__version__`, which needs no module.
    """
    top, _, inner = name.partition(".")
    if top != PACKAGE or inner == "__version__":
        return None
    while inner and inner not in modules:
        inner = inner.rpartition(".")[0]
    return inner or "__init__"


def import_graph(modules: Modules) -> dict[str, set[str]]:
    """The modules that each module imports."""
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for module in modules.values():
        for statement in imports_of(module):
            target = module_of_import(statement.name, modules)
            if target is not None and target != module.name:
                graph[module.name].add(target)
    return graph


def box_graph(modules: Modules) -> dict[str, set[str]]:
    """The import graph of the entries directly under the package."""
    graph: dict[str, set[str]] = {module.box: set() for module in modules.values()}
    for name, targets in import_graph(modules).items():
        box = modules[name].box
        graph[box] |= {target.partition(".")[0] for target in targets} - {box}
    return graph


def count_floors(graph: Mapping[str, set[str]]) -> int:
    """The number of boxes on the longest path; boxes that import each other in a circle count a floor each."""
    reachable = {box: _reachable(graph, box) for box in graph}

    @functools.cache
    def floors_from(box: str) -> int:
        circle = {box} | {other for other in reachable[box] if box in reachable[other]}
        below = reachable[box] - circle
        return len(circle) + max(map(floors_from, below), default=0)

    return max(map(floors_from, graph), default=0)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()] - reached:
            reached.add(target)
            waiting.append(target)
    return reached


@dataclass(frozen=True)
class Function:
    """A function of the source: its name in full, such as `training.loop.train`, and the names in full it calls."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    calls: frozenset[str]

    @property
    def lines(self) -> int:
        """The number of its source lines."""
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def takes_artifact(self) -> bool:
        """Whether a parameter's annotation mentions an Artifact."""
        arguments = self.node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        annotations = [ast.unparse(parameter.annotation) for parameter in parameters if parameter.annotation]
        return any(re.search(r"\bArtifact\b", annotation) for annotation in annotations)


def functions_of(modules: Modules) -> list[Function]:
    """Every function and method of the source; calls whose function is known from the imports are in full."""
    aliases = {name: _aliases(module, modules) for name, module in modules.items()}
    functions = []
    for module in modules.values():
        for owner, node in _definitions(module.tree, ""):
            calls = set()
            for call in ast.walk(node):
                if isinstance(call, ast.Call):
                    calls.add(_full_name(ast.unparse(call.func), module, owner, aliases))
            prefix = f"{module.name}.{owner}." if owner else f"{module.name}."
            functions.append(Function(prefix + node.name, node, frozenset(calls)))
    return functions


def _definitions(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield each function that is not inside another, with the name of its class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            yield owner, child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, child.name)
        else:
            yield from _definitions(child, owner)


def _aliases(module: Module, modules: Modules) -> dict[str, str]:
    """The names that a module can call, and what they are in full: its imports and its own functions and classes."""
    aliases = {}
    for node in module.tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            aliases[node.name] = f"{module.name}.{node.name}"
    for statement in imports_of(module):
        if module_of_import(statement.name, modules) is not None:
            aliases[statement.alias] = statement.name.removeprefix(f"{PACKAGE}.")
    return aliases


def _full_name(text: str, module: Module, owner: str, aliases: Mapping[str, Mapping[str, str]]) -> str:
    """The full name of a called function, through re-exports; the text itself where the imports do not tell."""
    first, _, rest = text.partition(".")
    if first in ("self", "cls") and owner:
        return f"{module.name}.{owner}.{rest}"
    if first not in aliases[module.name]:
        return text
    name = aliases[module.name][first] + (f".{rest}" if rest else "")
    for _ in range(len(aliases)):
        package, _, attribute = name.rpartition(".")
        target = aliases.get(package, {}).get(attribute, name)
        if target == name:
            break
        name = target
    return name


def measure_entries(checkout: "Checkout") -> Measurement:
    """Count the files and packages directly under the package."""
    entries = sorted(path.name for path in checkout.package.iterdir())
    entries = [name for name in entries if name not in ("__pycache__", "py.typed")]
    return Measurement(len(entries), entries)


def measure_boxes(checkout: "Checkout") -> Measurement:
    """Count the boxes of a drawing of the imports."""
    boxes = sorted(box_graph(checkout.modules))
    return Measurement(len(boxes), boxes)


def measure_floors(checkout: "Checkout") -> Measurement:
    """Count the floors of a drawing of the imports."""
    return Measurement(count_floors(box_graph(checkout.modules)))


def measure_arrows(checkout: "Checkout") -> Measurement:
    """Count the arrows of a drawing of the imports."""
    places = []
    for box, targets in box_graph(checkout.modules).items():
        places += [f"{box} -> {target}" for target in sorted(targets)]
    return Measurement(len(places), places)


def measure_single_importers(checkout: "Checkout") -> Measurement:
    """Count the modules that exactly one other module imports."""
    importers = defaultdict(set)
    for name, targets in import_graph(checkout.modules).items():
        for target in targets:
            importers[target].add(name)
    places = [f"{name} <- {min(users)}" for name, users in sorted(importers.items()) if len(users) == 1]
    return Measurement(len(places), places)


def measure_calls_to_step(checkout: "Checkout") -> Measurement:
    """Count the functions between the command and the optimizer step of a training run."""
    calls = list(training_stacks(checkout.root).optimizer_step)
    return Measurement(len(calls), calls)


def measure_calls_to_forward(checkout: "Checkout") -> Measurement:
    """Count the functions between the command and the backbone's forward of a training run."""
    calls = list(training_stacks(checkout.root).backbone_forward)
    return Measurement(len(calls), calls)


def measure_opening(checkout: "Checkout") -> Measurement:
    """Count the functions that read an artifact and build its method.

    A function rebuilds where it builds a method and either takes an Artifact or reads one. A way to open a prompt is a
    function that rebuilds and reads, or one that passes an artifact to a function that rebuilds and does not read.

    Raises:
        LookupError: The functions that build methods and read artifacts have other names now.
    """
    functions = functions_of(checkout.modules)
    names = {function.name for function in functions}
    for name in (BUILD_METHOD, READ_ARTIFACT):
        if name not in names:
            raise LookupError(f"{name} is gone; give its new name in {Path(__file__).name}")
    rebuilding = set()
    places = set()
    for function in functions:
        reads = READ_ARTIFACT in function.calls
        if BUILD_METHOD in function.calls and (reads or function.takes_artifact):
            rebuilding.add(function.name)
            if reads:
                places.add(function.name)
    takes_an_artifact = rebuilding - places
    for function in functions:
        if function.name not in rebuilding and function.calls & takes_an_artifact:
            places.add(function.name)
    return Measurement(len(places), sorted(places))


def measure_packing(checkout: "Checkout") -> Measurement:
    """Count the calls of the constructor of Artifact outside `artifacts`, where files become artifacts."""
    places = []
    for module, node in walk(checkout.modules, ast.Call):
        if module.box != "artifacts" and last_name(node.func) == "Artifact":
            places.append(place_of(module, node))
    return Measurement(len(places), places)


def measure_loops(checkout: "Checkout") -> Measurement:
    """Count the functions that call the `step` of an optimizer."""
    places = []
    for function in functions_of(checkout.modules):
        receivers = [call.removesuffix(".step") for call in function.calls if call.endswith(".step")]
        if any("optim" in receiver.rpartition(".")[2] for receiver in receivers):
            places.append(function.name)
    return Measurement(len(places), places)


def measure_site_names(checkout: "Checkout") -> Measurement:
    """Count the comparisons of a site with its name outside `injection` and `config`."""
    places = []
    for module, node in walk(checkout.modules, ast.Compare):
        if module.box in ("injection", "config"):
            continue
        operands = [node.left, *node.comparators]
        variables = [operand for operand in operands if isinstance(operand, ast.Name | ast.Attribute)]
        if variables and any(_site_literals(operand) for operand in operands):
            places.append(place_of(module, node))
    for module, pattern in walk(checkout.modules, ast.MatchValue):
        if module.box not in ("injection", "config") and _site_literals(pattern.value):
            places.append(place_of(module, pattern))
    return Measurement(len(places), places)


def _site_literals(node: ast.expr) -> bool:
    """Whether a literal, or a literal collection, names a site."""
    elements = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return any(isinstance(element, ast.Constant) and element.value in SITES for element in elements)


def measure_probes(checkout: "Checkout") -> Measurement:
    """Count `hasattr` and `getattr` with a default on methods and on their classes.

    A method is an expression that ends in one of METHOD_VARIABLES, a result of the registry's `find` or `build`, and a
    variable to which one of these is assigned.
    """
    places = []
    for function in functions_of(checkout.modules):
        if function.name.partition(".")[0] in BLIND_TO_METHODS:
            continue
        methods = set(METHOD_VARIABLES)
        for node in ast.walk(function.node):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _is_method(node.value, methods):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                methods |= {target.id for target in targets if isinstance(target, ast.Name)}
        for node in ast.walk(function.node):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            probes = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if probes and _is_method(node.args[0], methods):
                places.append(f"{function.name}: {ast.unparse(node)}")
    return Measurement(len(places), places)


def _is_method(node: ast.expr, methods: set[str]) -> bool:
    """Whether an expression is a method or its class; `methods` are the variables known to be one."""
    if isinstance(node, ast.Call):
        return last_name(node.func) in ("find", "build")
    return last_name(node) in methods


def measure_content_free_names(checkout: "Checkout") -> Measurement:
    """The percentage of variables and parameters whose name does not name the thing."""
    bindings = 0
    places = []
    for module in checkout.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            else:
                continue
            bindings += 1
            if name in CONTENT_FREE:
                places.append(f"{module.name}:{node.lineno} {name}")
    return Measurement(100 * len(places) / max(bindings, 1), places)


def measure_double_comprehensions(checkout: "Checkout") -> Measurement:
    """Count the comprehensions with more than one `for`."""
    places = []
    for kind in COMPREHENSIONS:
        for module, node in walk(checkout.modules, kind):
            if len(node.generators) > 1:
                places.append(place_of(module, node))
    return Measurement(len(places), sorted(places))


def measure_comprehensions(checkout: "Checkout") -> Measurement:
    """The number of comprehensions in 1,000 source lines."""
    count = 0
    for kind in COMPREHENSIONS:
        count += len(list(walk(checkout.modules, kind)))
    return Measurement(1000 * count / max(line_count(checkout.modules), 1))


def measure_code_lines(checkout: "Checkout") -> Measurement:
    """Count the source lines that hold code: no docstrings, comments and blank lines (ADR 9)."""
    return Measurement(sum(code_line_count(module) for module in checkout.modules.values()))


def code_line_count(module: Module) -> int:
    """The number of a module's lines with code; strings that are statements are documentation."""
    documentation: set[int] = set()
    for node in ast.walk(module.tree):
        is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_string and isinstance(node.value.value, str):
            documentation.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in WITHOUT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def measure_unused_dependencies(checkout: "Checkout") -> Measurement:
    """Count the distributions that the project asks for, extras for users included, and that no module imports."""
    imported = set()
    for module in checkout.modules.values():
        imported |= {statement.name.partition(".")[0] for statement in imports_of(module)}
    project = tomllib.loads((checkout.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra, wanted in project.get("optional-dependencies", {}).items():
        if extra not in ("test", "dev"):
            requirements += wanted
    places = []
    for requirement in requirements:
        distribution = re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()
        module_name = MODULE_OF_DISTRIBUTION.get(distribution, distribution.replace("-", "_"))
        if distribution not in {PACKAGE, *NEEDED_BY_TRANSFORMERS} and module_name not in imported:
            places.append(distribution)
    return Measurement(len(places), sorted(places))


def measure_heavy_imports(checkout: "Checkout") -> Measurement:
    """Count the heavy packages that the import of SoftPromptModel adds to what transformers imports by itself."""
    packages = imported_packages(checkout.root)
    heavy = sorted(HEAVY & (packages.with_model - packages.with_transformers))
    return Measurement(len(heavy), heavy)


class ImportedPackages(NamedTuple):
    """The packages in memory after the import of PreTrainedModel, and after that of SoftPromptModel."""

    with_transformers: frozenset[str]
    with_model: frozenset[str]


IMPORT_SCRIPT = """
import json, sys, torch
from transformers import PreTrainedModel
first = {name.partition(".")[0] for name in sys.modules}
from softprompts import SoftPromptModel
print(json.dumps([sorted(first), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@functools.cache
def imported_packages(root: Path) -> ImportedPackages:
    """Import the model in a process of its own, and list the packages that the process then has."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    with_transformers, with_model = json.loads(process.stdout.splitlines()[-1])
    return ImportedPackages(frozenset(with_transformers), frozenset(with_model))


NOT_FUNCTIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>"})
"""Names of frames that are no function; `<lambda>` is one."""


class TrainingStacks(NamedTuple):
    """The functions of the package on the stack, the command's first, at an optimizer step and in a forward."""

    optimizer_step: tuple[str, ...]
    backbone_forward: tuple[str, ...]


@functools.cache
def training_stacks(root: Path) -> TrainingStacks:
    """Train a tiny model through the command, in this process, and watch the stack at each step.

    Of the forwards only those count that keep a graph, because evaluation and initialization have ways of their own.

    Returns:
        The longest stacks of the run.

    Raises:
        LookupError: The run made no optimizer step or no forward.
    """
    import torch
    import yaml
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from transformers import PreTrainedModel

    import local
    from softprompts import cli

    package = root / "src" / PACKAGE
    step: list[str] = []
    forward: list[str] = []

    def on_step(*_: Any) -> None:
        functions = functions_on_stack(sys._getframe(), package)
        if len(functions) > len(step):
            step[:] = functions

    def on_forward(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, PreTrainedModel) and torch.is_grad_enabled():
            functions = functions_on_stack(sys._getframe(), package)
            if len(functions) > len(forward):
                forward[:] = functions

    hooks = [register_optimizer_step_pre_hook(on_step), register_module_forward_pre_hook(on_forward)]
    try:
        with tempfile.TemporaryDirectory() as folder, silence():
            config = Path(folder) / "run.yaml"
            config.write_text(yaml.safe_dump(local.run_values(Path(folder))), encoding="utf-8")
            cli.app(["train", "--config", str(config)], standalone_mode=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not step or not forward:
        raise LookupError("the training run made no optimizer step, or no forward of the backbone that keeps a graph")
    return TrainingStacks(tuple(step), tuple(forward))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print nothing inside."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def functions_on_stack(frame: FrameType | None, package: Path) -> list[str]:
    """The distinct functions of the package on the stack, the outermost first.

    Dunder methods, comprehensions and functions that a context manager enters do not count.
    """
    functions = []
    while frame is not None:
        code = frame.f_code
        entered = frame.f_back is not None and frame.f_back.f_code.co_filename == contextlib.__file__
        counts = not entered and not code.co_name.startswith("__") and code.co_name not in NOT_FUNCTIONS
        if counts and Path(code.co_filename).is_relative_to(package):
            name = f"{Path(code.co_filename).relative_to(package)}: {code.co_qualname}"
            if name not in functions:
                functions.append(name)
        frame = frame.f_back
    return functions[::-1]


def walk(modules: Modules, kind: type[Any]) -> Iterator[tuple[Module, Any]]:
    """Yield the nodes of a kind in all modules, with their modules."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, kind):
                yield module, node


def last_name(node: ast.expr) -> str:
    """The last identifier of a dotted name; empty for another expression."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def place_of(module: Module, node: Any) -> str:
    """The module, line and text of a node."""
    return f"{module.name}:{node.lineno} {ast.unparse(node)}"


def line_count(modules: Modules) -> int:
    """The number of source lines of all modules."""
    return sum(len(module.text.splitlines()) for module in modules.values())


@dataclass(frozen=True)
class Checkout:
    """A checkout of the repository at `root`, and the modules of its package."""

    root: Path
    modules: Modules

    @classmethod
    def read(cls, root: Path) -> "Checkout":
        """Parse the package of the checkout at `root`."""
        return cls(root, read_modules(root / "src" / PACKAGE))

    @property
    def package(self) -> Path:
        """The directory of the package."""
        return self.root / "src" / PACKAGE


class Limit(NamedTuple):
    """A measure and its bound: the value must be `relation` the `number`."""

    measure: Callable[[Checkout], Measurement]
    relation: str
    number: float

    def holds(self, value: float) -> bool:
        """Whether the value keeps the limit."""
        return RELATIONS[self.relation](value, self.number)

    def __str__(self) -> str:
        return f"{self.relation} {self.number:,g}"


LIMITS: Mapping[str, Limit] = {
    "entries under the package": Limit(measure_entries, "at most", 18),
    "boxes of the import graph": Limit(measure_boxes, "at most", 18),
    "floors of the import graph": Limit(measure_floors, "at most", 9),
    "arrows of the import graph": Limit(measure_arrows, "at most", 80),
    "modules with exactly one importer": Limit(measure_single_importers, "under", 15),
    "calls from the command to the optimizer step": Limit(measure_calls_to_step, "at most", 4),
    "calls from the command to the backbone's forward": Limit(measure_calls_to_forward, "at most", 8),
    "ways to open a prompt": Limit(measure_opening, "exactly", 1),
    "ways to pack an artifact": Limit(measure_packing, "exactly", 1),
    "training loops": Limit(measure_loops, "exactly", 1),
    "comparisons with a site's name": Limit(measure_site_names, "exactly", 0),
    "probes of a method": Limit(measure_probes, "exactly", 0),
    "content-free names in percent": Limit(measure_content_free_names, "under", 0.5),
    "comprehensions with two `for`": Limit(measure_double_comprehensions, "exactly", 0),
    "comprehensions per 1,000 lines": Limit(measure_comprehensions, "under", 25),
    "lines of code": Limit(measure_code_lines, "under", 18_500),
    "dependencies that nothing imports": Limit(measure_unused_dependencies, "exactly", 0),
    "heavy packages imported with the model": Limit(measure_heavy_imports, "exactly", 0),
}
"""The measures with the final limits of the design."""


def describe_sizes(checkout: Checkout, count: int = 5) -> list[str]:
    """Lines on size in all and on the largest files and functions, which have no limit."""
    files = sorted(checkout.modules.values(), key=lambda module: len(module.text.splitlines()), reverse=True)
    functions = sorted(functions_of(checkout.modules), key=lambda function: function.lines, reverse=True)
    shown = [f"{module.name} {len(module.text.splitlines())}" for module in files[:count]]
    longest = [f"{function.name} {function.lines}" for function in functions[:count]]
    total = f"lines of all kinds: {line_count(checkout.modules):,}"
    return [total, f"largest files (lines): {', '.join(shown)}", f"longest functions (lines): {', '.join(longest)}"]


def main() -> None:
    """Print every measure with its limit; `!` marks a limit that does not hold."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]  # this checkout's library, and the tiny models of the tests
    parser = argparse.ArgumentParser(prog="python -m tests.house", description="Print the measures of the house.")
    parser.add_argument("--places", metavar="WORDS", help="print the places behind measures with WORDS in their names")
    words = parser.parse_args().places
    checkout = Checkout.read(ROOT)
    broken = 0
    for name, limit in LIMITS.items():
        measurement = limit.measure(checkout)
        holds = limit.holds(measurement.value)
        broken += not holds
        print(f"{'' if holds else '!':2}{name:50}{measurement.value:>10,.5g}   {limit}")
        if words is not None and words in name:
            for place in measurement.places:
                print(f"      {place}")
    print("\n".join(describe_sizes(checkout)))
    print(f"{len(LIMITS) - broken} of {len(LIMITS)} limits hold")


if __name__ == "__main__":
    main()
