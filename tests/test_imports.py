"""Who may import whom: the table of the design, held by reading the imports of every source file."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "softprompts"

CORE = (
    "prompt config methods methods.* objectives backbone machine loading "
    "inject generate data artifact manifest files fingerprint peft_format several"
)
BELOW_TRAINING = f"{CORE} vectors transfer stored init words sentences learner assets text_metrics metrics plots report"
TRAINING = "checkpoint distil joint optimize train finetune"
MODELS = f"{BELOW_TRAINING} kernels tune parity {TRAINING} evaluate model"
RUNS = f"{MODELS} prepare opening results job variants"
ALL = f"{RUNS} recipes studies peft serve export"

# A row: what the file, or each file of the folder, may import of ours. Files of a folder may import each other, except
# `methods.*`, where the row names every file by itself.
OURS = {
    "__init__": ALL,
    "__main__": "cli",
    "prompt": "",
    "config": "",  # its files import each other
    "files": "",
    "peft_format": "",
    "fingerprint": "files prompt",
    "methods": "prompt config",  # the table that finds a method by its name
    "methods.*": "prompt",
    "objectives": "prompt config",
    "text_metrics": "",
    "metrics": "text_metrics",
    "plots": "",
    "report": "metrics plots",
    "families": "",
    "machine": "families",
    "quantize": "families",
    "kernels": "families",
    "backbone": "prompt families kernels quantize",
    "loading": "backbone families machine quantize",
    "inject": "backbone prompt kernels",
    "generate": "backbone prompt inject",
    "data": "backbone prompt config assets",
    "manifest": "config files",
    "several": "config files manifest peft_format",
    "artifact": "prompt config files fingerprint manifest peft_format several",
    "stored": "artifact methods prompt",
    "vectors": "artifact several transfer",
    "transfer": "",
    "init": "backbone inject prompt config artifact several vectors transfer",
    "words": "backbone prompt",
    "sentences": "assets backbone inject loading prompt",
    "learner": "backbone inject prompt config sentences",
    "tune": "backbone inject prompt kernels machine assets files",
    "parity": "backbone inject learner prompt kernels",
    "conversion": "",
    "assets": "backbone config conversion",
    "variants": "config",
    "checkpoint": "backbone data files machine",
    "distil": "artifact backbone checkpoint config data files inject prompt",
    "joint": "config data distil learner prompt",
    "optimize": "config learner methods",
    "train": MODELS,
    "finetune": "backbone checkpoint config data inject joint kernels learner objectives optimize prompt train",
    "evaluate": MODELS,
    "model": MODELS,
    "prepare": MODELS,
    "opening": f"{MODELS} prepare",
    "results": f"{MODELS} prepare",
    "job": f"{MODELS} prepare opening results variants",
    "recipes": f"{RUNS} transfer studies",
    "studies": f"{RUNS} recipes",
    "peft": f"{RUNS} recipes studies export",
    "serve": f"{MODELS.replace(TRAINING, '')} recipes studies export",
    "export": f"{MODELS.replace(TRAINING, '')} recipes studies serve",
    "cli": ALL,
}

# Rows that may import only these packages (and Python's own); the others are free within EXCLUSIVE.
THIRD_PARTY = {
    "prompt": "torch",
    "config": "pydantic yaml",
    "methods": "",
    "methods.*": "torch faiss",
    "objectives": "torch",
    "text_metrics": "numpy rouge_score sacrebleu",
    "metrics": "numpy scipy",
    "plots": "numpy matplotlib",
    "report": "",
    "families": "transformers",
    "machine": "torch",
    "kernels": "torch transformers",
    "quantize": "torch transformers bitsandbytes",
    "backbone": "torch transformers",
    "inject": "torch transformers",
    "generate": "torch transformers",
    "vectors": "torch",
    "stored": "torch",
    "transfer": "torch",
    "manifest": "",
}

# What only some rows may import; a name stands for everything below it.
EXCLUSIVE = {
    "peft": "finetune",
    "faiss": "methods.spt",
    "safetensors": "files artifact conversion",
    "transformers.cache_utils": "backbone kernels inject generate init",
    "transformers.generation": "backbone inject generate",
    "transformers.models.auto": "loading families",
    "bitsandbytes": "quantize",
    "matplotlib": "plots",
    "typer": "cli",
    "rich": "cli",
    "fastapi": "serve.http",
    "starlette": "serve.http",
    "uvicorn": "serve.http",
    "aiohttp": "serve.http",
    "vllm": "serve.vllm",
}


def sources() -> dict[str, ast.Module]:
    """Every source file, named as in `inject.read`; a folder's own file bears the folder's name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def row(module: str) -> str:
    folder, _, rest = module.partition(".")
    return "methods.*" if folder == "methods" and rest else folder


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """Full names of what a file imports, wherever in the file: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, line {node.lineno}: write `from softprompts...`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong(modules: dict[str, ast.Module]) -> list[str]:
    """Every import that the tables above do not allow, in words."""
    found = []
    for module, tree in modules.items():
        if row(module) not in OURS:
            found.append(
                f"{module} has no row in OURS of {Path(__file__).name}: add one, and to the table of the design"
            )
            continue
        for name in imported(module, tree):
            if name.split(".")[0] == "softprompts":
                found += wrong_house(module, name, modules)
            else:
                found += wrong_third_party(module, name)
    return found


def wrong_house(module: str, name: str, modules: dict[str, ast.Module]) -> list[str]:
    inner = name.removeprefix("softprompts").lstrip(".")
    while inner and inner not in modules and "." in inner:  # drop what is inside a file: `inject.read.prefill`
        inner = inner.rpartition(".")[0]
    if inner not in modules:  # a name of the package itself, as in `from softprompts import __version__`
        return []
    target = row(inner)
    together = target == row(module) and target != "methods.*"
    return [] if together or target in OURS[row(module)].split() else [f"{module} imports softprompts.{inner}"]


def wrong_third_party(module: str, name: str) -> list[str]:
    top = name.split(".")[0]
    if top in sys.stdlib_module_names:
        return []
    found = []
    if top not in THIRD_PARTY.get(row(module), top).split():
        found.append(f"{module} imports {top}; {row(module)} may import {THIRD_PARTY[row(module)] or 'no package'}")
    if name.startswith("transformers.Auto"):
        name = "transformers.models.auto"
    for package, allowed in EXCLUSIVE.items():
        if f"{name}.".startswith(f"{package}.") and not {row(module), module} & set(allowed.split()):
            found.append(f"{module} imports {name}; only {allowed or 'nobody'} may")
    return found


def test_imports_follow_the_table() -> None:
    assert wrong(sources()) == []


def test_one_file_names_devices() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        if module != "machine"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and node.value in ("cuda", "mps"))
        or (isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("prompt", "import transformers"),
        ("config", "import torch"),
        ("methods.a", "from softprompts.methods.b import B"),
        ("methods.a", "from softprompts.backbone import Backbone"),
        ("methods.a", "def f():\n    import transformers"),
        ("train", "from softprompts import cli"),
        ("serve.engine", "from softprompts.train import fit"),
        ("model", "from transformers import AutoModel"),
        ("model", "from transformers.cache_utils import DynamicCache"),
        ("data.sources", "import safetensors.torch"),
        ("peft", "import peft"),
        ("train", "import peft"),
        ("methods.a", "import faiss"),
        ("finetune", "from softprompts import evaluate"),
        ("evaluate", "import rich"),
        ("serve.engine", "import vllm"),
        ("surprise", "import json"),
    ],
)
def test_the_check_can_fail(module: str, text: str) -> None:
    others = dict.fromkeys(("methods.b", "backbone", "cli", "train", "evaluate"), ast.Module([], []))
    assert len(wrong({**others, module: ast.parse(text)})) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("inject.read", "from softprompts.inject.sites import fill"),
        ("cli", "from softprompts import __version__, train\nimport rich"),
        ("serve.vllm", "import vllm"),
        ("finetune", "def f():\n    import peft"),
        ("methods.spt", "def f():\n    import faiss"),
        ("peft", "from softprompts.methods import METHODS"),
    ],
)
def test_the_check_allows(module: str, text: str) -> None:
    others = dict.fromkeys(("inject.sites", "train", "methods"), ast.Module([], []))
    assert wrong({**others, module: ast.parse(text)}) == []
