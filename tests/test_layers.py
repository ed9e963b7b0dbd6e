"""Who may import whom: the layers of the design, checked against the imports of every source file."""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import house
from house import Module

MODULES = house.read_modules(house.ROOT / "src" / house.PACKAGE)

LAYERS = (
    ("errors", "types"),
    ("config",),
    ("methods", "backbone", "data", "assets", "artifacts"),
    ("injection",),
    ("model",),
    ("training", "evaluation", "serve"),
    ("recipes",),
    ("cli", "peft", "__init__", "__main__"),
)
"""A row may import the rows above it, and nothing else; the entries of a row do not import each other.

`serve` is planned and does not exist yet. The tables below already limit what it may import.
"""

LAST = LAYERS[-1]
"""The row whose entries may import each other."""

SIDEWAYS = {"data": {"assets"}}
"""What an entry may import from its own row."""

NARROWER = {"injection": {"errors", "types", "backbone"}}
"""Entries that may import these rows above them only."""

EXCLUDED = {"recipes": {"serve"}}
"""What an entry may not import although it is in a row above."""

OUTSIDE = ("studies", "benchmarks", "tests")
"""Packages of the checkout that the wheel does not contain."""

SHARED_BY_METHODS = {"methods.base", "methods.text"}
"""Modules of `methods` that a method's file may import; it imports no other, because a method is one file."""

THIRD_PARTY = {
    "errors": "",
    "types": "torch",
    "config": "pydantic yaml",
    "methods": "torch pydantic faiss",
    "methods.registry": "torch pydantic",
    "backbone": "torch transformers accelerate",
    "backbone.families": "transformers",
    "backbone.devices": "torch",
    "backbone.kernels": "torch transformers",
    "backbone.quantization": "torch transformers bitsandbytes",
    "artifacts": "torch safetensors",
    "artifacts.manifest": "",
    "artifacts.vectors": "torch",
    "injection": "torch transformers",
    "training.objectives": "torch",
    "evaluation.metrics": "numpy scipy sklearn",
    "evaluation.text_metrics": "numpy rouge_score sacrebleu",
    "evaluation.plots": "numpy matplotlib",
    "evaluation.page": "jinja2",
}
"""The third-party packages that a module may import, where these are limited; the most specific line counts."""

EXCLUSIVE = {
    "peft": "training.backbone_weights",
    "faiss": "methods.spt",
    "safetensors": "artifacts.io assets.gguf",
    "transformers.cache_utils": "backbone.cache",
    "transformers.generation": "backbone injection",
    "transformers.models.auto": "backbone.loading backbone.families",
    "bitsandbytes": "backbone.quantization",
    "jinja2": "evaluation.page",
    "matplotlib": "evaluation.plots",
    "sklearn": "evaluation.metrics",
    "typer": "cli",
    "rich": "cli",
    "fastapi": "serve.server",
    "starlette": "serve.server",
    "uvicorn": "serve.server",
    "aiohttp": "serve.server",
    "vllm": "serve.engines.vllm",
}
"""The modules that alone may import a package; each name on both sides includes everything below it."""

KNOWN: set[str] = set()
"""Violations that the rebuild of the core and of the cache removes; the set is to become empty."""


def is_below(name: str, package: str) -> bool:
    """Whether a dotted name is the package or something inside it."""
    return f"{name}.".startswith(f"{package}.")


def row_of(box: str) -> int | None:
    """The place of an entry in LAYERS, from 0; None for an entry without a row."""
    for number, row in enumerate(LAYERS):
        if box in row:
            return number
    return None


def allowed_boxes(box: str) -> set[str]:
    """The entries of the package that an entry may import, itself included."""
    number = row_of(box)
    allowed = {box} | SIDEWAYS.get(box, set())
    for row in LAYERS[:number]:
        allowed |= set(row)
    if box in LAST:
        allowed |= set(LAST)
    if box in NARROWER:
        allowed &= {box} | NARROWER[box]
    return allowed - EXCLUDED.get(box, set())


def violations(modules: Mapping[str, Module]) -> set[str]:
    """Every import that the layers and the limits on third parties do not allow, in words."""
    messages = set()
    for module in modules.values():
        if row_of(module.box) is None:
            messages.add(f"{module.name} has no row in LAYERS")
            continue
        for statement in house.imports_of(module):
            message = violation(module, statement.name, modules)
            if message is not None:
                messages.add(message)
    return messages


def violation(module: Module, name: str, modules: Mapping[str, Module]) -> str | None:
    """What is wrong with an import; None where nothing is."""
    top = name.partition(".")[0]
    if top == house.PACKAGE:
        target = house.module_of_import(name, modules)
        wrong = target is not None and not may_import(module, target)
        return f"{module.name} imports {house.PACKAGE}.{target}" if wrong else None
    if top in OUTSIDE:
        return f"{module.name} imports {top}"
    if top in sys.stdlib_module_names:
        return None
    if top not in third_party_of(module, top):
        return f"{module.name} imports {top}, but may import {', '.join(third_party_of(module, top)) or 'no package'}"
    if name.startswith("transformers.Auto"):
        name = "transformers.models.auto"
    for package, owners in EXCLUSIVE.items():
        if is_below(name, package) and not any(is_below(module.name, owner) for owner in owners.split()):
            return f"{module.name} imports {package}"
    return None


def may_import(module: Module, target: str) -> bool:
    """Whether a module may import another one of the package."""
    if is_method(module.name) and is_below(target, "methods"):
        return target in SHARED_BY_METHODS
    return target.partition(".")[0] in allowed_boxes(module.box)


def is_method(name: str) -> bool:
    """Whether a module is the file of a method."""
    return name.startswith("methods.") and name != "methods.registry"


def third_party_of(module: Module, package: str) -> list[str]:
    """The third-party packages that a module may import; `package` itself where nothing limits them."""
    parts = module.name.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in THIRD_PARTY:
            return THIRD_PARTY[name].split()
    return [package]


def test_imports_follow_the_layers() -> None:
    assert violations(MODULES) - KNOWN == set()


def test_known_violations_are_still_there() -> None:
    assert KNOWN - violations(MODULES) == set(), "take these out of KNOWN"


def test_every_name_of_the_tables_is_in_a_row() -> None:
    owners = " ".join(EXCLUSIVE.values()).split()
    for name in (*THIRD_PARTY, *owners, *SIDEWAYS, *NARROWER, *EXCLUDED):
        assert row_of(name.partition(".")[0]) is not None, name


def test_one_file_names_devices() -> None:
    places = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            name = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", None)
            if name in ("cuda", "mps") and module.name != "backbone.devices":
                places.append(f"{module.name}:{node.lineno}")
    assert places == []


def modules_with(name: str, text: str) -> dict[str, Module]:
    """Empty modules of the package, and one with this text."""
    others = ("methods.b", "methods.registry", "methods.text", "backbone", "injection.sites", "data", "assets", "types")
    names = (*others, "artifacts", "config", "errors", "model", "training", "evaluation", "serve.store", "recipes.run")
    modules = {}
    for other in (*names, "cli", "__init__"):
        modules[other] = Module.parse(other, "")
    return modules | {name: Module.parse(name, text)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("errors", "import torch"),
        ("types", "import transformers"),
        ("types", "from softprompts.errors import PromptError"),
        ("errors", "from softprompts.types import Batch"),
        ("config", "import torch"),
        ("config.schema", "from softprompts import methods"),
        ("methods.a", "from softprompts.methods.b import B"),
        ("methods.a", "from softprompts.methods import registry"),
        ("methods.a", "from softprompts.backbone import Backbone"),
        ("methods.a", "def f():\n    import transformers"),
        ("methods.a", "import faiss"),
        ("backbone.model", "from softprompts.artifacts import artifact"),
        ("backbone.model", "import bitsandbytes"),
        ("artifacts.io", "from softprompts.backbone import Backbone"),
        ("artifacts.manifest", "import safetensors"),
        ("data.sources", "import safetensors.torch"),
        ("data.sources", "from softprompts.backbone import Backbone"),
        ("assets.catalog", "from softprompts.data import Task"),
        ("injection.sites", "from softprompts.config import Run"),
        ("injection.sites", "from transformers.cache_utils import DynamicCache"),
        ("model.setup", "from softprompts.training import loop"),
        ("model.setup", "from transformers import AutoModel"),
        ("model.setup", "from softprompts import SoftPromptModel"),
        ("model.setup", "import softprompts"),
        ("training.loop", "from softprompts import cli"),
        ("training.loop", "from softprompts.evaluation import evaluate"),
        ("training.loop", "import peft"),
        ("evaluation.evaluate", "from softprompts.training import loop"),
        ("evaluation.evaluate", "import rich"),
        ("evaluation.page", "import matplotlib"),
        ("serve.store", "from softprompts.training import loop"),
        ("serve.store", "import fastapi"),
        ("serve.engines.transformers", "import vllm"),
        ("recipes.stages", "from softprompts.serve import store"),
        ("recipes.stages", "from softprompts import cli"),
        ("recipes.stages", "import studies.instance_prompts"),
        ("model.peft", "import peft"),
        ("surprise", "import json"),
    ],
)
def test_the_check_refuses(name: str, text: str) -> None:
    assert len(violations(modules_with(name, text))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.schema", "import pydantic\nfrom softprompts.errors import ConfigError"),
        ("methods.a", "from softprompts.methods.text import require_text\nimport pydantic"),
        ("methods.registry", "from softprompts.methods.b import B"),
        ("methods.spt", "def f():\n    import faiss"),
        ("data.sources", "from softprompts import assets"),
        (
            "injection.forward",
            "from softprompts.injection.sites import fill\nfrom softprompts.backbone import Backbone",
        ),
        ("backbone.cache", "from transformers.cache_utils import DynamicCache"),
        ("model.persistence", "from softprompts import __version__, artifacts"),
        ("training.backbone_weights", "def f():\n    import peft"),
        ("serve.store", "from softprompts.model import SoftPromptModel"),
        ("serve.server", "import fastapi"),
        ("serve.engines.vllm", "import vllm"),
        ("recipes.run.run", "from softprompts.training import loop\nfrom softprompts.evaluation import evaluate"),
        ("cli.train", "from softprompts import __version__, training\nimport rich"),
        ("peft", "from softprompts.model import SoftPromptModel"),
    ],
)
def test_the_check_allows(name: str, text: str) -> None:
    assert violations(modules_with(name, text)) == set()


def test_a_relative_import_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.setup:1 imports relatively"):
        violations(modules_with("model.setup", "from . import registry"))


def test_every_source_file_is_read() -> None:
    files = list(Path(house.ROOT / "src" / house.PACKAGE).rglob("*.py"))
    assert len(MODULES) == len(files) > 50
