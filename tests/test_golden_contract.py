"""Golden: what every method promises, and that training leaves the backbone as it was."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rows
import tiny
from closeness import assert_close, tolerance
from prompted import by_tensor, methods_of, prompted, spec_of, tensors
from rows import INPUT, called
from softprompts import backbone as b
from softprompts import injection
from softprompts.errors import BackboneError, PromptError
from softprompts.injection.generation import generate
from softprompts.methods import METHODS, build, build_tasks, find, fold
from softprompts.model import SoftPromptModel
from softprompts.model.registry import NewPrompt
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, Prompt, PromptInit, Step

pytestmark = pytest.mark.golden
TASKS = ("sst2", "mnli", "trec")
P = 5

MIXES = ("attempt",)
"""Methods whose prompt begins at the start plus a mixture of sources and start: they cannot begin at the start alone.

What the mixture is to the last digit is tested with each of them.
"""

LOOKS_UP = ("ipt",)
"""Methods whose prompt, at sites without layers, is looked up for the text's own tokens in a table: it has no more
tokens than the text and begins where the table does, and a row of the table has a gradient where its token is read.
"""

RETRIEVES = ("spt-reconstruction",)
"""Methods whose last tokens are mixtures of a memory's rows, here of the sources; the others begin at the start."""

RECTIFIED = ("p-tuning", "p-tuning by an mlp")
"""Methods with rectified units, of which some are off for all of a few tokens, and then have no gradient."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS if name != "p-tuning-v2"},  # which is prefix-tuning
    "dept": ("dept", {"positions": 2}),  # the texts of `batch_of` have no more unscored tokens
    # Three trained tokens, of prompt tuning too, cannot overfit the tiny T5, so here the memory learns.
    "spt-reconstruction": ("spt-reconstruction", {"k": 2, "retrieval": "soft", "trained": True}),
    "prefix-tuning by a network": ("prefix-tuning", {"reparametrize": True, "hidden": 16}),
    "p-tuning by an mlp": ("p-tuning", {"network": "mlp"}),
    "residual for each token": ("residual", {"per_token": True, "bottleneck": 16}),
}
"""Every method with its default configuration or one that suits a few short texts, and some computed in another way."""


def sites(name: str, method: str) -> list[injection.Site]:
    """The sites that a tiny model has and the method is for."""
    possible = find(CASES[method][0]).sites
    return [site for site in rows.sites(name) if site.name in possible]


def everywhere(*names: str) -> list[Any]:
    """(family, site, method) for every method at all of its sites."""
    return [(name, site, method) for method in CASES for name in names for site in sites(name, method)]


def tuned(
    name: str, method: str = "prompt-tuning", site: injection.Site | None = None, head: str = "lm"
) -> SoftPromptModel:
    """A method for three tasks on a shared tiny backbone, at the first of its sites if none is given."""
    bb = tiny.backbone(name, head)
    site = site or sites(name, method)[0]
    spec = injection.prompt_spec(bb, site, P)
    kind, options = CASES[method]
    init = PromptInit(rows.random(5, P, spec.width), torch.stack([rows.random(i, P, spec.width) for i in range(3)]))
    torch.manual_seed(0)
    return prompted(bb, site, build_tasks(kind, options, spec, init, TASKS))


def batch_of(name: str, tasks: list[int], seed: int = 0) -> Batch:
    """A batch for a language model with a task for each row; of a causal text the first two tokens are no labels.

    A method may look at these only.
    """
    lengths = [3 + (5 * i) % 7 for i in range(len(tasks))]
    found = rows.batch(name, rows.texts(name, lengths, seed), "left")
    labels = found.labels
    if name in tiny.CAUSAL:
        labels = labels.masked_fill(found.attention_mask.cumsum(1) <= 2, IGNORE)
    return Batch(found.input_ids, found.attention_mask, torch.tensor(tasks), labels)


def looked_up(made: SoftPromptModel, batch: Batch) -> list[list[int]]:
    """The tokens of each row that a prompt may be made from, at most as many as the prompt is long."""
    mask = made.context(batch).attention_mask.bool()
    return [row[there][: spec_of(made).length].tolist() for row, there in zip(batch.input_ids, mask, strict=True)]


def rated(made: SoftPromptModel, prompt: float) -> list[dict[str, Any]]:
    """The method's parameters in groups for an optimizer: what counts as a prompt learns fast, weights slowly."""
    named = tensors(made).items()
    return [
        {
            "params": [p for key, p in named if key.partition(".")[2].startswith(group.parameters)],
            "lr": prompt if group.unit == "rms" else 0.01,
        }
        for group in methods_of(made)[0].groups.values()
    ]


def loss(made: SoftPromptModel, batch: Batch) -> Tensor:
    """The task loss of one step."""
    return objectives.task(training_step(made, batch))


@pytest.mark.parametrize(("name", "site", "method"), everywhere("llama", "t5", "bert"), ids=called)
def test_fills_its_slot_and_starts_there(name: str, site: injection.Site, method: str) -> None:
    made = tuned(name, method, site)
    batch = batch_of(name, [2, 0, 2, 2])
    prompt = made.make_prompts(batch)
    assert prompt.values.shape[1:] == (spec_of(made).length, spec_of(made).width)
    assert prompt.values.dtype == torch.float32
    assert prompt.mask.shape == prompt.values.shape[:2]
    if method in LOOKS_UP and not spec_of(made).layers:
        assert prompt.lengths[prompt.prompt_index].tolist() == [len(read) for read in looked_up(made, batch)]
        assert (
            prompt.values.abs().max() <= 3**0.5 * rows.random(5, P, spec_of(made).width).square().mean().sqrt() + 1e-6
        )
        return
    assert prompt.mask.all()
    assert prompt.prompt_index.shape == (4,)
    assert len(prompt.values) <= 4
    start = rows.random(5, P, spec_of(made).width)
    for values in prompt.values[prompt.prompt_index]:
        if method in MIXES:
            mixed = torch.stack([start, *(rows.random(i, P, spec_of(made).width) for i in range(3))])
            rest = values - start
            limit = tolerance(values)
            assert (mixed.amin(0) - limit <= rest).all()
            assert (rest <= mixed.amax(0) + limit).all()
        elif method in RETRIEVES:
            memory = torch.cat([rows.random(i, P, spec_of(made).width) for i in range(3)])
            assert_close(values[:3], start[:3])
            assert (memory.amin(0) - 1e-6 <= values[3:]).all()
            assert (values[3:] <= memory.amax(0) + 1e-6).all()
        else:
            assert_close(values, start)


@torch.no_grad()
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_prompt_does_not_know_the_answer(name: str, method: str) -> None:
    """In training as in answering: other labels, and texts without them, have the same prompts."""
    made = tuned(name, method)
    batch = batch_of(name, [2, 0, 1, 2])
    prompt = made.make_prompts(batch)
    scored = batch.labels != IGNORE
    labels = batch.labels.masked_fill(scored, 7)
    same = [Batch(batch.input_ids, batch.attention_mask, batch.task_ids, labels)]
    if name in tiny.CAUSAL:  # whose labels are part of the text
        ids = batch.input_ids.masked_fill(scored, 7)
        same = [
            Batch(ids, batch.attention_mask, batch.task_ids, labels),
            Batch(batch.input_ids, batch.attention_mask * ~scored, batch.task_ids),
        ]
    for other in same:
        found = made.make_prompts(other)
        assert_close(found.values[found.prompt_index], prompt.values[prompt.prompt_index])


@torch.no_grad()
@pytest.mark.parametrize("method", CASES)
def test_ignores_neighbors(method: str) -> None:
    made = tuned("llama", method)
    for parameter in made.prompts.parameters():
        parameter.add_(rows.random(8, *parameter.shape))
    batch = batch_of("llama", [2, 0, 1, 2])
    together = made.make_prompts(batch)
    for i in range(4):
        alone = made.make_prompts(batch.rows(torch.tensor([i])))
        found, expected = together.values[together.prompt_index[i]], alone.values[alone.prompt_index[0]]
        assert_close(found, expected)


@pytest.mark.parametrize("method", CASES)
def test_nothing_is_learned_from_batches_without_text(method: str) -> None:
    """What a text decides cannot be learned where there is none: the prompt that answers would be another."""
    made = tuned("llama", method)
    batch = batch_of("llama", [2, 0, 1, 2])
    every = batch.attention_mask.bool()
    batch = replace(batch, labels=batch.input_ids.where(every, IGNORE))
    if not find(CASES[method][0]).input_dependent:
        assert made.make_prompts(batch, training=True).values.requires_grad
        return
    with pytest.raises(PromptError, match="no row of the batch has text before its labels"):
        made.make_prompts(batch, training=True)
    with torch.no_grad():
        assert len(made.make_prompts(batch).prompt_index) == 4
    some = replace(batch, labels=batch.labels.masked_fill(torch.arange(4)[:, None] == 1, IGNORE))
    assert made.make_prompts(some, training=True).values.requires_grad


@torch.no_grad()
@pytest.mark.parametrize(("name", "site", "method"), everywhere("llama", "t5", "bert"), ids=called)
def test_a_row_beside_prompt_tuning_is_the_row_alone(name: str, site: injection.Site, method: str) -> None:
    """Rows of the method and of a shorter prompt in one batch, read on every path the model has; and written."""
    one = tuned(name, method, site)
    for i, parameter in enumerate(one.prompts.parameters()):
        parameter.add_(rows.random(70 + i, *parameter.shape) / 4)
    spec = injection.prompt_spec(one.backbone, site, 2)
    plain = build("prompt-tuning", {}, spec, PromptInit(rows.random(7, 2, spec.width)))
    one.registry.add(NewPrompt("plain", plain, one.registry.records[TASKS[0]]), one.device)
    batch = batch_of(name, [0, 3, 1, 3, 2])
    for path in (None, *rows.paths(name, site)):
        output = one.score(batch, path=path)
        for i in range(5):
            expected = one.score(batch.rows(torch.tensor([i]))).logits
            torch.testing.assert_close(rows.of_row(output, i), expected, atol=5e-5, rtol=1e-4)
    if name not in tiny.GENERATING:
        return
    given: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    texts = {"attention_mask": batch.attention_mask, "task_ids": batch.task_ids}
    written = one.generate(batch.input_ids, **texts, **given)
    for i in range(5):
        row = {key: value[i : i + 1] for key, value in texts.items()}
        assert torch.equal(written[i], one.generate(batch.input_ids[i : i + 1], **row, **given)[0])


@pytest.mark.parametrize(("name", "site", "method"), everywhere("llama", "gemma3", "t5", "bart", "bert"), ids=called)
def test_every_parameter_gets_a_gradient(name: str, site: injection.Site, method: str) -> None:
    """A dead-row scan: after a few steps on all tasks no row of any parameter has been without a gradient.

    Of rectified units only some need to have had one.
    """
    made = tuned(name, method, site)
    seen = {key: torch.zeros(len(p)) for key, p in tensors(made).items()}
    optimizer, read = torch.optim.Adam(tensors(made).values(), lr=1e-2), set[int]()
    for seed in range(2):
        optimizer.zero_grad()
        batch = batch_of(name, [0, 1, 2, 0, 1, 2], 10 * seed)
        read |= {token for row in looked_up(made, batch) for token in row}
        loss(made, batch).backward()
        for key, parameter in tensors(made).items():
            assert parameter.grad is not None, f"{key} has no gradient"
            assert parameter.grad.isfinite().all(), key
            seen[key] += parameter.grad.flatten(1).abs().sum(1) if parameter.dim() > 1 else parameter.grad.abs()
        optimizer.step()
    if method in LOOKS_UP:
        table = seen.pop("sst2.shared.table.rows")
        assert set(table.nonzero()[:, 0].tolist()) == read
    if method in RECTIFIED:
        seen = {key: rest.sum(0, keepdim=True) if "network" in key else rest for key, rest in seen.items()}
    assert {key: rest.eq(0).nonzero()[:, 0].tolist() for key, rest in seen.items() if rest.eq(0).any()} == {}


@torch.no_grad()
@pytest.mark.parametrize(("name", "site", "method"), everywhere("llama", "t5", "bert"), ids=called)
def test_folds_exactly(name: str, site: injection.Site, method: str) -> None:
    """Whatever its parameters are, the plain prompt of each task answers to the bit as the method does."""
    made = tuned(name, method, site)
    kind = find(CASES[method][0])
    if kind.input_dependent or kind.changes_text:
        assert [fold(each) for each in methods_of(made)] == [None] * 3
        return
    for i, parameter in enumerate(made.prompts.parameters()):
        parameter.add_(rows.random(i, *parameter.shape))
    batch = batch_of(name, [2, 0, 1, 2])
    made.train()
    plain = torch.stack([fold(each) for each in methods_of(made)])
    made.eval()
    assert plain.shape == (3, P, spec_of(made).width)
    assert not torch.equal(plain[0], plain[2])
    prompt = made.make_prompts(batch)
    folded = Prompt(plain, torch.ones(3, P, dtype=torch.bool), batch.task_ids)
    assert torch.equal(made.score(batch, prompts=prompt).logits, made.score(batch, prompts=folded).logits)


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_overfits_eight_examples(name: str, method: str) -> None:
    """Eight texts of two kinds with an answer word for each kind are learned to 100 %."""
    kind = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    words = torch.tensor([11, 12])[kind]
    texts = [torch.cat([torch.full((4,), 20 + 20 * int(k)), rows.ids(30 + i, 3)]) for i, k in enumerate(kind)]
    if name in tiny.SEQ2SEQ:
        text, mask = rows.pad(texts)
        labels = words[:, None]
    else:
        text, mask = rows.pad([torch.cat([t, w[None]]) for t, w in zip(texts, words, strict=True)])
        labels = torch.full_like(text, IGNORE)
        labels[:, -1] = words
    batch = Batch(text, mask, torch.zeros(8, dtype=torch.long), labels)
    made = tuned(name, method)
    # Here a looked-up prompt is one row of the table four times, which has farther to go.
    optimizer = torch.optim.Adam(rated(made, prompt=0.3 if method in LOOKS_UP else 0.1))
    for _ in range(400):
        output = training_step(made, batch).output
        if output.logits.argmax(1).equal(output.labels):
            return
        optimizer.zero_grad()
        loss(made, batch).backward()
        optimizer.step()
    pytest.fail(f"{int((output.logits.argmax(1) == output.labels).sum())} of 8 learned")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that training must leave as it is: bytes, module identities, hooks, attributes, configuration."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    modules = dict(model.named_modules())
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "bytes": digest.hexdigest(),
        "modules": {key: id(module) for key, module in modules.items()},
        "attributes": {key: sorted(vars(module)) for key, module in modules.items()},
        "hooks": {key: [list(vars(module)[hook]) for hook in hooks] for key, module in modules.items()},
        "config": model.config.to_dict(),
        "training": {key: module.training for key, module in modules.items()},
    }


FROZEN = [
    *((name, site, "lm") for name, site in rows.cases(("llama", "opt", "gemma2", "t5", "bart", "bert"))),
    *((name, INPUT, head) for name in ("llama", "bart", "bert") for head in ("sequence", "span")),
]
FROZEN_BY = [
    *((*case, "prompt-tuning") for case in FROZEN),
    *((name, sites(name, method)[0], "lm", method) for method in CASES for name in ("llama", "t5")),
    ("llama", rows.ADD, "lm", "idpg"),
]


@pytest.mark.parametrize(("name", "site", "head", "method"), FROZEN_BY, ids=called)
def test_frozen(name: str, site: injection.Site, head: str, method: str) -> None:
    made = tuned(name, method, site=site, head=head)
    model = made.backbone.model
    before = snapshot(model)
    start = [p.detach().clone() for p in made.prompts.parameters()]
    optimizer = torch.optim.Adam(tensors(made).values(), lr=0.1)
    batch = batch_of(name, [0, 1, 2, 0])
    if head != "lm":
        labels = torch.tensor([0, 1, 2, 0]) if head == "sequence" else torch.full((4, 2), batch.input_ids.shape[1] - 1)
        batch = Batch(batch.input_ids, batch.attention_mask, batch.task_ids, labels)
    for _ in range(3):
        optimizer.zero_grad()
        loss(made, batch).backward()
        optimizer.step()
    assert snapshot(model) == before
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(
        (p - s).abs().sum() > 0 for p, s in zip(made.prompts.parameters(), start, strict=True) if p.requires_grad
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "site", "method"), everywhere("llama", "t5"), ids=called)
def test_scores_and_writing_react_to_every_block(name: str, site: injection.Site, method: str) -> None:
    """What is trained is what answers: each parameter of a task moves the loss, and the scores of what is written."""
    made = tuned(name, method, site)
    for i, parameter in enumerate(by_tensor(made)):  # away from starts at zero, behind which nothing reacts
        parameter.add_(rows.random(60 + i, *parameter.shape) / 4)
    batch = batch_of(name, [0, 1, 2])
    texts = Batch(
        batch.input_ids,
        batch.attention_mask * (batch.attention_mask.cumsum(1) <= 2 if name == "llama" else 1),
        batch.task_ids,
    )

    def both() -> tuple[Tensor, Tensor]:
        prompt = made.make_prompts(batch)
        step = Step(batch, prompt, made.score(batch, prompts=prompt))
        options = {"max_new_tokens": 2, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        written = generate(made.backbone, texts, made.make_prompts(texts), site, **options)
        return objectives.task(step), torch.stack(written.scores)

    score, scores = both()
    for key, parameter in made.prompts.named_parameters():
        if method == "multitask-prompt-tuning" and site.mode == "replace" and key.endswith(".columns"):
            continue  # a factor of a token's whole state, which every layer norms before it reads it
        kept = parameter.clone()
        parameter.add_(rows.random(3, *parameter.shape))
        other, others = both()
        parameter.copy_(kept)
        assert abs(float(other - score)) > 1e-6, key
        assert float((others - scores).abs().max()) > 1e-6, key


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bert"])
@pytest.mark.parametrize("broken", ["layer", "head"])
def test_nothing_is_left_behind_after_an_error(name: str, broken: str) -> None:
    bb = b.wrap(tiny.model(name), name=name)
    values = rows.random(0, 3, injection.prompt_width(bb, rows.REPLACE))
    batch = rows.batch(name, rows.texts(name))
    before = snapshot(bb.model)
    module = bb.layers[-1] if broken == "layer" else bb.model.get_output_embeddings()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        injection.score(bb, batch, rows.single(values, 4), rows.REPLACE)
    handle.remove()
    assert snapshot(bb.model) == before
    assert injection.score(bb, batch, rows.single(values, 4), rows.REPLACE).logits.isfinite().all()


def test_a_head_that_reads_something_else_is_noticed() -> None:
    """Scores are never silently of something else than the replayed states."""
    bb = b.wrap(tiny.model("llama"), name="llama")
    other = tiny.model("llama").model
    forward = type(bb.model).forward

    def elsewhere(input_ids: Tensor, **_: Any) -> Any:
        own, bb.model.model = bb.model.model, other
        try:
            return forward(bb.model, input_ids=input_ids)
        finally:
            bb.model.model = own

    output = bb.trunk(input_ids=torch.tensor([[5, 6]]))
    bb.model.forward = elsewhere
    with pytest.raises(BackboneError, match="the head of LlamaForCausalLM does not read its trunk's output"):  # noqa: SIM117
        with bb.replay(output):
            bb.model(input_ids=torch.tensor([[5, 6]]))
