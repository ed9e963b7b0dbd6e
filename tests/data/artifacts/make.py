"""Write the fixtures of old artifacts, with the code of the commits that wrote these formats.

Today's code cannot run this script: it calls the API of the commits that README.md names. To write one format, check
out its commit, and say in this folder
    PYTHONPATH=CHECKOUT/src:CHECKOUT/tests python make.py format1
`backbones` instead of a format draws the backbones, tokenizers and texts anew (PYTHONPATH of format 3). Every prompt of
every format then is for other weights, so all formats must be written again.
"""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMATS = {"format1": 1, "format2": 2, "format3": 3}
MODELS = ("llama", "gpt2", "t5", "bert")
TEXTS = ("the thing 3 is red", "the thing 81 is blue", "the other thing is green")
IGNORE = -100
COLORS = {"red": "warm", "orange": "warm", "blue": "cold", "green": "cold"}

# What is trained ------------------------------------------------------------------------------------------------------

LONG = {"template": "The color of <{text}> is", "verbaliser": {"cold": "blue", "warm": "red"}, "separator": " "}
FULL = {
    "name": "full",
    "template": "Review: {text}\nSentiment",
    "verbaliser": {"warm": "positive", "cold": "negative"},
    "separator": ": ",
    "max_length": 48,
    "truncate": ["text"],
    "metrics": ["f1-macro", "accuracy"],
    "positive": "warm",
}
WRITTEN = {"kind": "generation", "template": "{text}. What is it?", "metrics": ["exact-match"]}

# case -> model, formats that have it, and what its run sets; `tasks` of a run with several tasks.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "input-llama": ("llama", "1 3", {"task": FULL}),
    "input-t5": ("t5", "1 3", {"task": LONG}),
    "decoder-t5": ("t5", "1 3", {"prompt": {"site": "decoder"}, "task": WRITTEN}),
    "kv-gpt2": ("gpt2", "1 3", {"prompt": {"site": "kv"}}),
    "layers-gpt2": ("gpt2", "1 3", {"prompt": {"site": "layers", "mode": "add", "init": {"kind": "vocabulary"}}}),
    "classes-bert": ("bert", "1 3", {"model": {"head": "sequence"}, "task": {"template": "{text}"}}),
    "mask-bert": ("bert", "1 3", {"task": {"template": "{text} it is {mask}."}}),
    "two-tasks": ("llama", "1 3", {"tasks": [{"name": "one"}, {"name": "two", "template": "Text: {text} Class:"}]}),
    "multitask": (
        "llama",
        "2 3",
        {
            "prompt": {"method": "multitask-prompt-tuning", "options": {"ranks": 2, "start": "normal", "spread": 0.1}},
            "tasks": [{"name": "one"}, {"name": "two", "template": "Text: {text} Class:"}],
        },
    ),
    "multitask-t5": (
        "t5",
        "2 3",
        {"prompt": {"method": "multitask-prompt-tuning"}, "tasks": [{"name": "one"}, {"name": "two"}]},
    ),
    "attempt": (
        "llama",
        "2 3",
        {
            "prompt": {
                "method": "attempt",
                "init": {"sources": ["runs/source1/prompt", "runs/source2/prompt"]},
                "options": {"rank": 3, "temperature": 5.0},
            },
            "task": FULL,
        },
    ),
    "ipt": (
        "llama",
        "2 3",
        {"prompt": {"method": "ipt", "options": {"table": "low-rank", "rank": 2, "base": "start", "spread": 0.5}}},
    ),
    "ipt-encoder": (
        "t5",
        "2 3",
        {"prompt": {"method": "ipt", "options": {"strategy": "mlp", "table": "hashed", "rows": 16, "dropout": 0.1}}},
    ),
    "idpg": (
        "gpt2",
        "2 3",
        {
            "prompt": {
                "method": "idpg",
                "site": "layers",
                "mode": "add",
                "options": {"hidden": 4, "phm": 2, "shared": True, "normalise": False, "start": "normal"},
            }
        },
    ),
    "idpg-states": (
        "bert",
        "2 3",
        {
            "prompt": {"method": "idpg", "options": {"generator": "dnn", "hidden": 3, "encoder": "backbone"}},
            "task": {"template": "{text} it is {mask}."},
        },
    ),
    "prefix-network": (
        "gpt2",
        "3",
        {"prompt": {"method": "prefix-tuning", "site": "kv", "options": {"reparametrise": True, "hidden": 6}}},
    ),
    "p-tuning-v2": (
        "bert",
        "3",
        {
            "model": {"head": "sequence"},
            "prompt": {"method": "p-tuning-v2", "site": "layers", "options": {"dropout": 0.1}},
            "task": {"template": "{text}"},
        },
    ),
    "p-tuning": ("llama", "3", {"prompt": {"method": "p-tuning", "options": {"hidden": 4, "output": "torch"}}}),
    "residual": (
        "t5",
        "3",
        {"prompt": {"method": "residual", "options": {"bottleneck": 4, "per_token": True, "output": "torch"}}},
    ),
    "low-rank": ("llama", "3", {"prompt": {"method": "low-rank", "options": {"rank": 2}}}),
    "dept": (
        "llama",
        "2 3",
        {"prompt": {"method": "dept", "options": {"rank": 2, "positions": 12, "scale": 0.5}}, "task": FULL},
    ),
    "retrieval": (
        "llama",
        "2 3",
        {
            "prompt": {
                "method": "spt-reconstruction",
                "options": {"k": 2, "bank": 12, "query": "words", "retrieval": "soft", "temperature": 2.0},
            }
        },
    ),
    "suffix": ("llama", "3", {"prompt": {"place": "suffix"}}),
    "slots": ("llama", "3", {"task": {"template": "<prompt:1>the {text}<prompt:3>:"}}),
    "slot-bert": ("bert", "3", {"task": {"template": "{text}<prompt:4> it is {mask}"}}),
    "chat": (
        "llama",
        "3",
        {"task": {"chat": True, "chat_place": "user", "system": "Answer with one word.", "template": "{text}?"}},
    ),
}
# Prompts that others begin with, or mix, and their digests; the runs of `CASES` that use them say where they are.
SOURCES = {f"source{seed}": {"seed": seed} for seed in (1, 2)}


def values(case: str, model: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run of four steps."""
    task = {"source": "colors.csv", "name": "colors", "template": "{text}:"}
    split = {"split": {"validation_fraction": 0.1, "test_fraction": 0.2}}
    init = {"init": {"kind": "random"}}
    made: dict[str, Any] = {
        "model": {"name": f"backbones/{model}", "dtype": "float32", "threads": 1, **changes.get("model", {})},
        "prompt": {"length": 4, **changes.get("prompt", {})},
        "train": {"steps": 4, "batch_size": 8, "rate": 0.5, "head_rate": 0.05},
        "evaluate": {"resamples": 100, "max_new_tokens": 4},
        "out": f"runs/{case}",
        "seed": changes.get("seed", 0),
    }
    made["prompt"] = {**init, **made["prompt"]}
    if "tasks" in changes:
        made["tasks"] = [{**task, **split, **one} for one in changes["tasks"]]
    else:
        made["task"] = {**task, **split, **changes.get("task", {})}
    return made


# What the old code answers --------------------------------------------------------------------------------------------


def some(scores: Tensor) -> Tensor:
    """Every fourth score of a row; of a few classes all. The loss of the model tells of the others."""
    return scores if scores.shape[1] < 10 else scores[:, ::4]


def batch(
    family: str, head: str, vocabulary: int, segments: tuple[int, ...], place: str, words: bool
) -> dict[str, Tensor]:
    """Three rows of random token ids, padded on the left, as a Batch's fields without `task`."""
    draw = torch.Generator().manual_seed(11)
    lengths = (8, 6, 7)
    ids = torch.zeros(3, 8, dtype=torch.long)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 8 - length :] = torch.randint(5, vocabulary, (length,), generator=draw)
        mask[row, 8 - length :] = 1
    labels = torch.full((3, 8), IGNORE)
    if head == "sequence":
        labels = torch.tensor([0, 1, 1])
    elif family == "seq2seq":
        labels = torch.randint(5, vocabulary, (3, 2), generator=draw)
    elif family == "causal":
        labels[:, -2:] = ids[:, -2:]
    else:
        labels[:, -3] = torch.randint(5, vocabulary, (3,), generator=draw)
    fields = {"ids": ids, "mask": mask, "labels": labels}
    if place == "template":
        count = max(len(segments), 1)
        fields["place"] = torch.tensor([[1, 4], [0, 3], [2, 2]])[:, :count].contiguous()
        if segments:
            fields["segments"] = torch.tensor(segments).expand(3, -1).contiguous()
    if words:
        fields["words"] = mask * (mask.cumsum(1) <= 2)
    return fields


def expected(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the old code says of the artifact at `path`; tensors get their values under the path's name."""
    from softprompts.evaluate import answers
    from softprompts.prompt import Batch

    from softprompts import artefact, job
    from softprompts.config import ModelConfig

    found = artefact.load(path)
    facts = {
        **{key: getattr(found, key) for key in FACTS},
        "segments": list(getattr(found, "segments", ())),
        "shape": list((found.initial if found.prompt is None else found.prompt).shape),
        "parents": list(found.parents),
        "digest": found.digest,
        "sum": getattr(found, "sum", None),
    }
    try:
        opened = job.open_artefacts([path], model=ModelConfig(name=found.backbone, dtype="float32", threads=1))
    except artefact.ArtefactError as error:
        return {**facts, "refused": str(error)}
    base, learner = opened.learner.backbone, opened.learner
    segments = getattr(found, "segments", ())
    query = found.options.get("query") == "words"
    fields = batch(found.family, found.head, base.vocabulary, segments, found.place, query)
    given = Batch(task=torch.zeros(3, dtype=torch.long), **fields)
    with torch.no_grad():
        prompt = learner.prompt(given)
        logits = learner.forward(given, prompt).logits
    name = path.as_posix()
    own = {"batch." + key: value for key, value in fields.items()}
    own |= {"logits": some(logits), "prompt": found.prompt, "initial": found.initial}
    if found.prompt is None:
        own |= {"rows.values": prompt.values[prompt.row], "rows.mask": prompt.mask[prompt.row]}
    own |= {"head." + key: value for key, value in found.heads.items()}
    tensors.update({f"{name}|{key}": value.contiguous().clone() for key, value in own.items() if value is not None})
    config = job.judging_of(found)
    rows = [{"text": text} for text in TEXTS]
    answered = answers(learner, opened.encoder, rows, config) if opened.encoder else ()
    return {
        **facts,
        "warnings": list(opened.warnings),
        "evaluate": config.model_dump(mode="json"),
        "answers": [{"value": one.value, "text": one.text, "scores": one.scores} for one in answered],
    }


FACTS = ("task", "method", "options", "site", "mode", "place", "family", "head", "backbone", "revision", "format")
FACTS += ("scores", "version")


def model_says(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What SoftPromptModel says of all prompts at `path`: rows of the batch take turns among the tasks."""
    from softprompts import artefact, job
    from softprompts.config import ModelConfig
    from softprompts.model import SoftPromptModel

    first = (
        path
        if (path / "softprompts.json").exists()
        else path / json.loads((path / "tasks.json").read_text())["tasks"][0]
    )
    found = artefact.load(first)
    opened = job.open_artefacts([first], model=ModelConfig(name=found.backbone, dtype="float32", threads=1))
    base = opened.learner.backbone
    segments = getattr(found, "segments", ())
    query = found.options.get("query") == "words"
    fields = batch(found.family, found.head, base.vocabulary, segments, found.place, query)
    model = SoftPromptModel.from_pretrained(base.model, path, tokenizer=base.tokenizer)
    tasks = [model.tasks[row % len(model.tasks)] for row in range(3)]
    more = {new: fields[old] for old, new in (("place", "prompt_places"), ("words", "words")) if old in fields}
    with torch.no_grad():
        output = model(fields["ids"], fields["mask"], labels=fields["labels"], tasks=tasks, **more)
    logits = output.logits if found.head == "sequence" else output.logits[:, -1]
    tensors[f"{path.as_posix()}|model.logits"] = some(logits).contiguous().clone()
    return {"tasks": list(model.tasks), "loss": float(output.loss)}


def freeze(case: Path) -> None:
    """Write expected.json and expected.safetensors of the artifacts in the directory of a case."""
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {"artifacts": {}, "models": {}}
    inside = Path.cwd()
    artifacts = sorted(path.parent.relative_to(inside) for path in (inside / case).rglob("softprompts.json"))
    units = sorted(path.parent.relative_to(inside) for path in (inside / case).rglob("tasks.json"))
    for path in artifacts:
        told["artifacts"][path.as_posix()] = expected(path, tensors)
    for path in units or artifacts:
        try:
            told["models"][path.as_posix()] = model_says(path, tensors)
        except Exception as error:  # what the code of that time did not load is no promise
            told["models"][path.as_posix()] = {"refused": f"{type(error).__name__}: {error}"}
    save_file(tensors, case / "expected.safetensors")
    (case / "expected.json").write_text(json.dumps(told, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    print(case, len(artifacts), "artifacts", flush=True)


# Everything -----------------------------------------------------------------------------------------------------------


def write_format(name: str) -> None:
    """Train the runs of a format, keep their artifacts in `name`, and what the code says of them."""
    from softprompts import job
    from softprompts.config import parse

    number = FORMATS[name]
    shutil.rmtree("runs", ignore_errors=True)
    shutil.rmtree(name, ignore_errors=True)
    for case, changes in SOURCES.items() if number > 1 else ():
        job.execute(parse(values(case, "llama", changes)))
    for case, (model, formats, changes) in CASES.items():
        if str(number) in formats.split():
            job.execute(parse(values(case, model, changes)))
            keep(Path("runs", case, "prompt"), Path(name, case))
    write_collections(name, number)
    if number == 3:
        write_others(name)
    for case in sorted(Path(name).iterdir()):
        freeze(case)
    shutil.rmtree("runs")


def keep(path: Path, case: Path) -> None:
    case.mkdir(parents=True)
    shutil.copytree(path, case / "prompt")


def write_collections(name: str, number: int) -> None:
    """What SoftPromptModel saves: two tasks of their own, and two that share a prompt (from format 2 on)."""
    from softprompts import job
    from softprompts.config import ModelConfig, PromptConfig
    from softprompts.model import SoftPromptModel

    for case, model, method in (("collection", "llama", ""), ("shared", "llama", "multitask-prompt-tuning")):
        if (number == 1 and method) or (number == 2 and not method):
            continue
        base = job.load_backbone(ModelConfig(name=f"backbones/{model}", dtype="float32", threads=1))
        config = {"length": 3, "init": {"kind": "random"}, **({"method": method} if method else {})}
        model_of = SoftPromptModel(base.model, tokenizer=base.tokenizer)
        tasks = ("b", "a") if number == 1 else ("b", "a/1")
        if method:
            model_of.add_tasks(tasks, PromptConfig.model_validate(config))
        else:
            for task in tasks:
                model_of.add_task(task, PromptConfig.model_validate(config))
        train_model(model_of)
        model_of.save_pretrained(Path(name, case, "prompt"))


def train_model(model: Any) -> None:
    """A few steps of a plain loop."""
    draw = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(4):
        ids = torch.randint(5, 200, (4, 8), generator=draw)
        model(ids, torch.ones_like(ids), labels=ids, tasks=[model.tasks[i] for i in (0, 1, 1, 0)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def write_others(name: str) -> None:
    """A sum of vectors, a folded prompt, a pretrained table and a run that begins with it, a checkpoint."""
    from softprompts import artefact, job, stored, vectors
    from softprompts.config import parse
    from softprompts.recipes import pretrain

    total = vectors.read("runs/source1/prompt + 0.5*runs/source2/prompt")
    made = vectors.made(total, total.like.initial, 0.75)
    artefact.save(made, Path(name, "sum", "prompt"))
    folded = stored.plain(artefact.load("runs/p-tuning/prompt"), "p-tuning")
    artefact.save(folded, Path(name, "folded", "prompt"))
    table = CASES["ipt"][2]["prompt"]
    pretrain.execute(parse(values("table", "llama", {"prompt": table})))
    job.execute(parse(values("ipt-pretrained", "llama", {"prompt": {**table, "init": {"state": "runs/table/prompt"}}})))
    keep(Path("runs/ipt-pretrained/prompt"), Path(name, "ipt-pretrained"))
    shutil.copytree("runs/table/prompt", Path(name, "ipt-pretrained", "table"))
    checkpoint = Path("../checkpoints/old")
    checkpoint.mkdir(parents=True, exist_ok=True)
    shutil.copy("runs/input-llama/checkpoint.safetensors", checkpoint / "checkpoint.safetensors")
    run = values("input-llama", "llama", CASES["input-llama"][2])
    (checkpoint / "run.json").write_text(json.dumps(run, indent=1) + "\n")


def write_backbones() -> None:
    """Tiny random models with tokenizers, and the texts that runs train on."""
    import transformers

    import tiny
    import tokenizers_tiny as tokenizers

    for name in MODELS:
        tokenizer = {
            "llama": lambda: tokenizers.byte_bpe(chat=True),
            "gpt2": tokenizers.byte_bpe,
            "t5": tokenizers.unigram,
            "bert": tokenizers.wordpiece,
        }[name]()
        config = tiny.CONFIGS[name]()
        config.vocab_size = len(tokenizer)
        config.num_hidden_layers = 2
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
        if name == "t5":
            config.decoder_start_token_id = tokenizer.pad_token_id
        elif name != "gpt2":
            config.max_position_embeddings = 96
        config.architectures = None
        torch.manual_seed(0)
        auto = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForMaskedLM"}.get(name, "AutoModelForCausalLM")
        model = getattr(transformers, auto).from_config(config)
        spread(model)
        folder = Path("backbones", name)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if name == "bert":  # with what a classifier has beside it, so that nothing is drawn when it is loaded
            add_classifier(folder, config)
        # Half as large, and read as float32 all the same, because config.json says so.
        weights = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    chance = random.Random(0)
    lines = ["text,label"]
    for number in range(60):
        color = chance.choice(list(COLORS))
        lines.append(f"the thing {number} is {color},{COLORS[color]}")
    Path("colors.csv").write_text("\n".join(lines) + "\n")


def add_classifier(folder: Path, config: Any) -> None:
    import transformers

    config.num_labels = 2
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    spread(model)
    more = {key: value for key, value in model.state_dict().items() if "pooler" in key or "classifier" in key}
    save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors", {"format": "pt"})


def spread(model: torch.nn.Module) -> None:
    """Weights wider than usual, so that scores differ clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write_backbones() if sys.argv[1] == "backbones" else write_format(sys.argv[1])
