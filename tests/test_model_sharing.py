"""A SoftPromptModel whose tasks share one prompt: mixed batches, one shared tensor, PEFT's files both ways."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import rows
import tiny
from artifacts import example
from closeness import tolerance
from softprompts.artifacts import artifact
from softprompts.backbone import fingerprint, wrap
from softprompts.config import InitConfig, PromptConfig
from softprompts.errors import ArtifactError, ConfigError
from softprompts.methods import fold
from softprompts.model import SoftPromptModel
from softprompts.model.peft import MultitaskPromptTuningConfig, PromptTuningConfig
from softprompts.types import IGNORE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
P = 4
TASKS = ("mnli", "qqp", "sst2")


def names_of(*tasks: str) -> set[str]:
    """The tensors of tasks that share a prompt: each once, the shared one by the first task's name."""
    own = {f"prompts.{task}.{part}" for task in tasks for part in ("columns", "rows")}
    return {f"prompts.{tasks[0]}.shared.prompt", *own}


PLAIN = PromptConfig(num_virtual_tokens=6, init=InitConfig(kind="random"))


def shared(name: str, head: str = "lm", ranks: int = 1, **more: Any) -> Any:
    """A tiny model with three tasks whose factors differ."""
    config = MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3, num_ranks=ranks)
    model = SoftPromptModel(tiny.model(name, head, **more), config, tasks=TASKS)
    move(model)
    return model


def move(model: Any) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(model.prompts.parameters()):
            parameter.copy_(rows.random(i, *parameter.shape) + 0.3)


def theirs(name: str, **options: Any) -> Any:
    """The same tiny model under PEFT's multitask prompt tuning."""
    kind = "SEQ_2_SEQ_LM" if name in tiny.SEQ2SEQ else "CAUSAL_LM"
    model = tiny.model(name)
    model.name_or_path = ""  # PEFT would look it up
    options = {"task_type": kind, "num_virtual_tokens": P, "num_tasks": 3, "num_transformer_submodules": 1, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own remarks about models without a name
        return peft.get_peft_model(model, peft.MultitaskPromptTuningConfig(**options)).eval()


def logits(model: Any, name: str, task_ids: list[int]) -> Tensor:
    """Scores of text positions, by ours or PEFT's model."""
    ids = torch.stack(rows.texts(name, [7] * len(task_ids)))
    found: Tensor = model(input_ids=ids, labels=ids, task_ids=torch.tensor(task_ids)).logits
    return found.detach()[:, -7:]


def train(model: Any, name: str, steps: int = 3) -> None:
    ids = torch.stack(rows.texts(name, [7] * 3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, task_ids=torch.arange(3)).loss.backward()
        optimizer.step()


def test_tasks_share_one_prompt_and_each_has_its_factors() -> None:
    model = shared("llama")
    assert (model.tasks, model.task) == (TASKS, "mnli")
    assert set(model.state_dict()) == names_of(*TASKS)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(model.state_dict())
    ids = rows.ids(1, 6)[None]
    model(ids, labels=ids, tasks="qqp").loss.backward()
    graded = {n for n, p in model.prompts.named_parameters() if p.grad is not None and p.grad.any()}
    assert graded == {"mnli.shared.prompt", "qqp.columns", "qqp.rows"}
    named = SoftPromptModel(tiny.model("llama"), MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=2))
    assert named.tasks == ("0", "1")
    one = SoftPromptModel(tiny.model("llama"), MultitaskPromptTuningConfig(num_virtual_tokens=P))
    assert (one.tasks, set(one.state_dict())) == (("default",), names_of("default"))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_mixed_batches_equal_each_task_alone(name: str) -> None:
    """Tasks of a group, and plain prompts of other lengths and groups beside them."""
    model = shared(name, ranks=2)
    model.add_task("plain", PLAIN)
    model.add_tasks(["a", "b"], MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2))
    move(model)
    assert model.tasks == (*TASKS, "plain", "a", "b")
    names = ["sst2", "b", "mnli", "plain", "qqp", "sst2", "a"]
    texts = rows.texts(name, (5, 8, 3, 6, 7, 2, 4))
    ids, mask = rows.pad(texts, "right", value=0)
    labels = ids.masked_fill(mask == 0, IGNORE)
    found = model(ids, mask, labels=labels, tasks=names).logits
    places = torch.tensor([model.tasks.index(task) for task in names])
    assert torch.equal(found, model(ids, mask, labels=labels, task_ids=places).logits)
    for i, text in enumerate(texts):
        alone = model(text[None], labels=text[None], tasks=names[i]).logits
        torch.testing.assert_close(found[i, : len(text)], alone[0], **CLOSE)
        plain = SoftPromptModel(tiny.model(name), PromptConfig(num_virtual_tokens=P, init=InitConfig(kind="random")))
        if names[i] in TASKS:
            with torch.no_grad():
                plain.prompts["default"].prompt.copy_(fold(model.prompts[names[i]]))
            torch.testing.assert_close(plain(text[None], labels=text[None]).logits, alone, **CLOSE)
    if name != "bert":
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = model.generate(ids, attention_mask=mask, tasks=names, **options)
        for i, text in enumerate(texts):
            assert torch.equal(together[i, -4:], model.generate(text[None], tasks=names[i], **options)[0, -4:])


@pytest.mark.golden
@pytest.mark.parametrize(("name", "ranks"), [("llama", 1), ("gpt2", 2), ("t5", 1), ("t5", 2)])
def test_ours_loads_in_peft(tmp_path: Path, name: str, ranks: int) -> None:
    model = shared(name, ranks=ranks)
    train(model, name)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.model(name), tmp_path).eval()
    torch.testing.assert_close(logits(model, name, [0, 2, 1]), logits(loaded, name, [0, 2, 1]), **CLOSE)
    assert not torch.allclose(logits(loaded, name, [0]), logits(loaded, name, [1]), atol=1e-3)
    for i, task in enumerate(TASKS):  # and each by itself, as a plain prompt
        single = peft.PeftModel.from_pretrained(tiny.model(name), tmp_path / task).eval()
        assert single.peft_config["default"].peft_type == "PROMPT_TUNING"
        ids = torch.stack(rows.texts(name, [7]))
        found = single(input_ids=ids, labels=ids).logits[:, -7:]
        torch.testing.assert_close(found, logits(model, name, [i]), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_our_files_are_the_ones_peft_writes(tmp_path: Path, name: str) -> None:
    model = shared(name, ranks=2)
    model.save_pretrained(tmp_path / "ours")
    made = theirs(name, num_ranks=2)
    made.save_pretrained(tmp_path / "theirs")
    ours, expected = ((tmp_path / who / "adapter_config.json").read_text() for who in ("ours", "theirs"))
    assert json.loads(ours) == {**json.loads(expected), "revision": json.loads(ours)["revision"]} | {
        key: json.loads(ours)[key] for key in ("base_model_name_or_path", "num_attention_heads", "num_layers")
    }
    assert ours == json.dumps(json.loads(ours), indent=2, sort_keys=True) + "\n"
    assert len(json.loads(ours)) == 21
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: v.shape for k, v in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}
    assert torch.equal(tensors[0]["prompt_embeddings"], model.prompts["mnli"].shared.prompt)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors"),
        *TASKS,
        "tasks.json",
    ]


@pytest.mark.golden
@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("gpt2", 1), ("t5", 2)])
def test_a_directory_of_peft_is_used_and_trained_on(tmp_path: Path, name: str, ranks: int) -> None:
    made = theirs(name, num_ranks=ranks)
    with torch.no_grad():
        for i, parameter in enumerate(made.prompt_encoder.parameters()):
            parameter.copy_(rows.random(i, *parameter.shape) + 0.5)
    train(made, name)
    made.save_pretrained(tmp_path)
    ours = SoftPromptModel.from_pretrained(tiny.model(name), tmp_path)
    assert ours.tasks == ("0", "1", "2")
    assert set(ours.state_dict()) == names_of("0", "1", "2")
    torch.testing.assert_close(logits(ours, name, [2, 0, 1]), logits(made, name, [2, 0, 1]), **CLOSE)
    before = ours.prompts["0"].shared.prompt.detach().clone()
    train(ours, name)
    assert not torch.equal(ours.prompts["2"].shared.prompt, before)
    ours.save_pretrained(tmp_path / "more")
    again = peft.PeftModel.from_pretrained(tiny.model(name), tmp_path / "more").eval()
    torch.testing.assert_close(logits(again, name, [2, 0, 1]), logits(ours, name, [2, 0, 1]), **CLOSE)


@pytest.mark.golden
def test_of_pefts_two_halves_the_encoders_is_taken_as_its_generate_does(tmp_path: Path) -> None:
    made = theirs("t5", num_transformer_submodules=2)
    with torch.no_grad():
        for i, parameter in enumerate(made.prompt_encoder.parameters()):
            parameter.copy_(rows.random(i, *parameter.shape) + 0.5)
    made.save_pretrained(tmp_path)
    ours = SoftPromptModel.from_pretrained(tiny.model("t5"), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(ours.prompts["0"].shared.prompt, stored["prompt_embeddings"][:P])
    assert torch.equal(ours.prompts["2"].columns, stored["prefix_task_cols"][2, :P])
    ids = torch.stack(rows.texts("t5", (7, 7, 7)))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = made.generate(input_ids=ids, task_ids=torch.arange(3), **options)
    assert torch.equal(ours.generate(ids, task_ids=torch.arange(3), **options), expected)


@pytest.mark.golden
def test_saved_and_loaded_it_is_the_same_group_bit_for_bit_and_trains_on(tmp_path: Path) -> None:
    straight = shared("llama", ranks=2)
    straight.add_task("plain", PLAIN)
    straight.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert (again.tasks, again.task) == (straight.tasks, straight.task)
    assert list(again.state_dict()) == list(straight.state_dict())
    for model in (straight, again):
        train(model, "llama")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in straight.state_dict().items())
    one = artifact.load(tmp_path / "qqp")
    assert (one.task, one.method, set(one.state)) == (
        "qqp",
        "multitask-prompt-tuning",
        {"shared.prompt", "columns", "rows"},
    )
    torch.testing.assert_close(one.prompt, one.state["shared.prompt"] * (one.state["columns"] @ one.state["rows"]))
    alone = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path / "qqp")
    assert alone.tasks == ("qqp",)
    assert alone.prompts["qqp"].shared.prompt.requires_grad


def test_initial_prompts_are_where_each_task_began(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=2, factors_init="normal")
    model = SoftPromptModel(tiny.model("llama"), config, tasks=["a", "b"])
    model.save_pretrained(tmp_path)
    found = [artifact.load(tmp_path / name) for name in ("a", "b")]
    assert all(torch.equal(one.initial, one.prompt) for one in found)
    assert not torch.equal(found[0].initial, found[1].initial)


def test_a_task_added_like_one_of_a_group_joins_it(tmp_path: Path) -> None:
    model = shared("llama")
    shared_module = model.prompts["qqp"].shared
    model.task = "qqp"
    model.add_task("cola")
    method = model.prompts["cola"]
    assert model.registry.group("cola") == (*TASKS, "cola")
    assert method.shared is shared_module
    assert torch.equal(fold(method), method.shared.prompt)  # it begins at the shared prompt
    assert logits(model, "llama", [3, 1]).shape[0] == 2
    model.save_pretrained(tmp_path)
    assert torch.equal(artifact.load(tmp_path, "cola").initial, method.shared.prompt)
    assert peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path).peft_config["default"].num_tasks == 4
    # with a configuration of its own it stands alone
    model.add_task("alone", MultitaskPromptTuningConfig(num_virtual_tokens=P))
    assert model.registry.group("alone") == ("alone",)
    model.add_task("like", PLAIN)
    model.task = "like"
    model.add_task("copy")  # prompt tuning shares nothing
    assert (model.registry.group("like"), model.registry.group("copy")) == (("like",), ("copy",))


def test_a_task_added_to_attempt_mixes_the_same_sources(tmp_path):
    """It joins what the tasks share, the attention and the sources, and starts where the first task started."""
    backbone = wrap(tiny.model("llama"))
    sources = []
    for i in range(2):
        prompt = rows.random(i, P, 32)
        made = example(prompt=prompt, initial=prompt, state={}, fingerprint=fingerprint(backbone))
        sources.append(str(artifact.save(made, tmp_path / str(i))))
    config = PromptConfig(
        method="attempt", num_virtual_tokens=P, init=InitConfig(kind="random", sources=tuple(sources))
    )
    model = SoftPromptModel(tiny.model("llama"), config, task="first")
    model.add_task("second")
    ids = rows.ids(3, 6)[None].expand(2, -1)
    both = model(input_ids=ids, tasks=["first", "second"]).logits
    torch.testing.assert_close(both[0], both[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("second.prompt"):
                parameter.add_(1.0)
    moved = model(input_ids=ids, tasks=["first", "second"]).logits
    torch.testing.assert_close(moved[0], both[0])
    assert float((moved[1] - both[1]).abs().max().detach()) > 1e-3


def test_a_task_that_leaves_takes_only_its_own_along(tmp_path: Path) -> None:
    model = shared("llama")
    expected, kept = logits(model, "llama", [2, 0]), model.prompts["sst2"].rows
    model.remove_task("qqp")
    assert model.tasks == model.registry.group("mnli") == ("mnli", "sst2")
    assert model.prompts["sst2"].rows is kept
    assert torch.equal(logits(model, "llama", [1, 0]), expected)
    model.save_pretrained(tmp_path)
    model.load_prompt(tmp_path / "sst2")  # again, by itself: it shares no more
    assert (model.tasks, model.registry.group("mnli")) == (("mnli", "sst2"), ("mnli",))
    torch.testing.assert_close(logits(model, "llama", [1, 0]), expected, **CLOSE)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()  # of the group that was here before
    assert SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path).tasks == ("mnli", "sst2")


def test_tasks_come_back_in_their_order_whatever_shares(tmp_path: Path) -> None:
    model = shared("llama")
    model.add_task("plain", PLAIN)
    model.task = "qqp"
    model.add_task("a.b, c")
    move(model)
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert again.tasks == model.tasks == (*TASKS, "plain", "a.b, c")
    assert torch.equal(logits(again, "llama", [4, 3, 0, 2]), logits(model, "llama", [4, 3, 0, 2]))
    other = SoftPromptModel(tiny.model("llama"), PLAIN, "first")
    assert other.load_prompts(tmp_path) == (model.tasks, [])
    assert other.tasks == ("first", *model.tasks)


def test_one_task_is_one_artifact_which_peft_reads_folded(tmp_path: Path) -> None:
    model = SoftPromptModel(tiny.model("gpt2"), MultitaskPromptTuningConfig(num_virtual_tokens=P, num_ranks=2), "one")
    move(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.model("gpt2"), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "PROMPT_TUNING"
    torch.testing.assert_close(logits(loaded, "gpt2", [0]), logits(model, "gpt2", [0]), **CLOSE)
    again = SoftPromptModel.from_pretrained(tiny.model("gpt2"), tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_heads_are_each_tasks_own_and_peft_has_one_for_all(tmp_path: Path, head: str) -> None:
    model = shared("llama", head)
    assert len(model.heads) == 3
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.model("llama", head), tmp_path)  # untrained copies are still alike
    assert loaded.peft_config["default"].num_tasks == 3
    own = next(iter(model.heads["qqp"].parameters()))
    assert torch.equal(loaded.base_model.state_dict()["score.modules_to_save.default.weight"], own)
    ids = torch.stack(rows.texts("llama", (6, 6)))
    expected = model(ids, tasks=["sst2", "qqp"]).logits
    torch.testing.assert_close(expected[0], model(ids[:1], tasks="sst2").logits[0], **CLOSE)
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / name, tmp_path / "theirs" / name)
    from_peft = SoftPromptModel.from_pretrained(tiny.model("llama", head), tmp_path / "theirs")
    torch.testing.assert_close(from_peft(ids, tasks=["2", "1"]).logits, expected, **CLOSE)
    with torch.no_grad():
        next(iter(model.heads["qqp"].parameters())).add_(1)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    told = json.loads((tmp_path / "tasks.json").read_text())
    assert (told["groups"], told["peft"]) == ([list(TASKS)], f"head {head} of each task: PEFT has one for all")
    again = SoftPromptModel.from_pretrained(tiny.model("llama", head), tmp_path)
    assert torch.equal(again(ids, tasks=["sst2", "qqp"]).logits, model(ids, tasks=["sst2", "qqp"]).logits)


def test_what_peft_cannot_reproduce_is_not_written_for_it(tmp_path: Path) -> None:
    model = shared("bert")
    model.save_pretrained(tmp_path / "bert")
    assert "placement after_start: PEFT puts" in json.loads((tmp_path / "bert" / "tasks.json").read_text())["peft"]
    model = shared("llama")
    model.add_tasks(["a", "b"], PromptConfig(method="multitask-prompt-tuning", site="kv", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "tasks.json").read_text())["peft"] == "2 groups: PEFT's files hold one"
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path / "two")
    assert (again.registry.group("qqp"), again.registry.group("b")) == (TASKS, ("a", "b"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    shared("llama").save_pretrained(tmp_path / "all")
    return tmp_path / "all"


def test_one_of_several_is_loaded_by_name_or_place(saved: Path) -> None:
    by_name, by_place = artifact.load(saved, "qqp"), artifact.load(saved, 1)
    assert by_name.digest == by_place.digest == artifact.load(saved / "qqp").digest
    theirs = copy_of_peft(saved)
    for task in (1, "1"):
        one = artifact.load(theirs, task)
        assert (one.task, one.method, one.options) == ("1", "multitask-prompt-tuning", {"ranks": 1})
        assert torch.equal(one.prompt, by_name.prompt)
        assert all(torch.equal(one.state[key], value) for key, value in by_name.state.items())
    artifact.save(one, saved.parent / "single")
    again = artifact.load(saved.parent / "single", "1")
    assert torch.equal(again.state["rows"], by_name.state["rows"])
    for path, task, message in (
        (saved, None, "holds 3 prompts; give the directory of one: its prompts are in mnli, qqp, sst2"),
        (saved, "qpq", r"holds no prompt 'qpq'; did you mean 'qqp'\? its prompts are in"),
        (saved, 3, "holds no prompt 3"),
        (saved / "qqp", "sst2", "holds one prompt, 'qqp', and none called 'sst2'"),
        (theirs, None, r"holds the prompts of 3 tasks, 0, 1, 2; say which is meant \(task=0\), or load all"),
        (theirs, 3, "there is no task 3"),
        (theirs, "qqp", "there is no task 'qqp'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            artifact.load(path, task)


def copy_of_peft(saved: Path) -> Path:
    """PEFT's two files of the directory alone."""
    alone = saved.parent / "theirs"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved / name, alone / name)
    return alone


def test_one_task_of_pefts_loads_without_saying_which(tmp_path: Path) -> None:
    made = theirs("gpt2", num_tasks=1, num_ranks=2)
    made.save_pretrained(tmp_path / "theirs")
    one = artifact.load(tmp_path / "theirs")
    assert (one.task, one.method, one.options) == ("theirs", "multitask-prompt-tuning", {"ranks": 2})
    torch.testing.assert_close(one.prompt, one.state["shared.prompt"] * (one.state["columns"] @ one.state["rows"]))
    ours = SoftPromptModel.from_pretrained(tiny.model("gpt2"), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, "gpt2", [0]), logits(made, "gpt2", [0]), **CLOSE)


@pytest.mark.parametrize(
    ("stored", "config", "message"),
    [
        ({"prefix_task_rows": ...}, {}, "no tensor 'prefix_task_rows', which a multitask prompt has"),
        ({"prefix_task_cols": torch.ones(3, P, 1).long()}, {}, "prefix_task_cols must be floating point"),
        ({"prefix_task_cols": torch.ones(3, P + 1, 1)}, {}, "do not fit each other"),
        ({"prefix_task_rows": torch.ones(3, 2, 32)}, {}, "do not fit each other"),
        ({"prefix_task_rows": torch.ones(2, 1, 32)}, {}, "do not fit each other"),
        ({"prefix_task_cols": torch.ones(3, P)}, {}, "do not fit each other"),
        ({"prefix_task_rows": torch.full((3, 1, 32), torch.inf)}, {}, "prompt has NaN or Inf in"),
        ({"extra": torch.ones(1)}, {}, "tensor 'extra' belongs neither to the prompt nor to modules_to_save"),
        ({}, {"num_tasks": 2}, r"num_tasks is 2, but prefix_task_cols has shape \[3, 4, 1\]"),
        ({}, {"num_ranks": 3}, r"num_ranks is 3, but prefix_task_cols has shape \[3, 4, 1\]"),
        ({}, {"num_virtual_tokens": 2}, "prompt_embeddings has shape"),
        ({}, {"peft_type": "PROMPT_TUNING"}, r"tensor 'prefix_task_(cols|rows)' belongs neither to the prompt"),
    ],
)
def test_files_of_peft_that_are_wrong(
    saved: Path, stored: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    alone = copy_of_peft(saved)
    tensors = {**load_file(alone / "adapter_model.safetensors"), **stored}
    save_file({k: v for k, v in tensors.items() if v is not Ellipsis}, alone / "adapter_model.safetensors")
    values = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**values, **config}))
    with pytest.raises(ArtifactError, match=message):
        artifact.load(alone, 0)


def test_a_directory_whose_files_do_not_belong_together_is_refused(saved: Path) -> None:
    stock = tiny.model("llama")
    shutil.copytree(saved, saved.parent / "other")
    model = SoftPromptModel.from_pretrained(stock, saved.parent / "other")
    move(model)
    with torch.no_grad():
        model.prompts["sst2"].shared.prompt.add_(1)
    model.save_pretrained(saved.parent / "other")
    shutil.copytree(saved.parent / "other" / "qqp", saved / "qqp", dirs_exist_ok=True)
    with pytest.raises(ArtifactError, match=r"'shared\.prompt', which mnli and qqp share, differs between them"):
        SoftPromptModel.from_pretrained(stock, saved)
    shutil.copy(saved.parent / "other" / "adapter_model.safetensors", saved)
    with pytest.raises(ArtifactError, match=r"PEFT saved here later; delete tasks.json to load PEFT's prompts"):
        SoftPromptModel.from_pretrained(stock, saved)
    for tasks in ([".."], ["a/b"], [""], "mnli", [1]):
        (saved / "tasks.json").write_text(json.dumps({"tasks": tasks}))
        with pytest.raises(ArtifactError, match="must list the sub-directories of its tasks"):
            SoftPromptModel.from_pretrained(stock, saved)
    for groups in ([["mnli", "nli"]], [["mnli", "qqp"], ["qqp", "sst2"]], "mnli", [["../mnli"]]):
        values = {"tasks": list(TASKS), "groups": groups}
        (saved / "tasks.json").write_text(json.dumps(values))
        with pytest.raises(ArtifactError, match="each of groups must list some of its tasks, and no task twice"):
            SoftPromptModel.from_pretrained(stock, saved)


def test_one_prompt_is_not_saved_among_several_nor_several_over_one(saved: Path) -> None:
    one = SoftPromptModel(tiny.model("llama"), PLAIN)
    with pytest.raises(ArtifactError, match="is not empty and is not an artifact: it holds several"):
        one.save_pretrained(saved)
    with pytest.raises(ArtifactError, match="already holds a prompt; give another directory for these 3"):
        shared("llama").save_pretrained(copy_of_peft(saved))
    shared("llama").save_pretrained(saved)
    with pytest.raises(ConfigError, match="no prompt is loaded"):
        SoftPromptModel(tiny.model("llama")).save_pretrained(saved)


def test_names_and_numbers_must_agree() -> None:
    stock, config = tiny.model("llama"), MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3)
    model = SoftPromptModel(stock, PLAIN, "plain")
    for call, message in (
        (lambda: SoftPromptModel(stock, config, tasks=["a", "b"]), "num_tasks is 3, but 2 are named: a, b"),
        (lambda: SoftPromptModel(stock, config, tasks="abc"), "name the tasks as a list, given 'abc'"),
        (lambda: SoftPromptModel(stock, config, "a"), "task 'a' names one prompt; give the names of all 3 as tasks"),
        (lambda: SoftPromptModel(stock, config, tasks=["a", "b", "a"]), "prompt 'a' already exists"),
        (lambda: SoftPromptModel(stock, config, tasks=["a", "b", ""]), "a task needs a name"),
        (lambda: SoftPromptModel(stock, tasks=["a"]), "tasks names prompts, but config is missing"),
        (lambda: SoftPromptModel(stock, PLAIN, tasks=[]), r"name the tasks as a list, given \[\]"),
        (lambda: model.add_task("a", config), "num_tasks is 3, but 1 are named: a"),
        (lambda: model.add_tasks(["a", "b", "plain"], config), "prompt 'plain' already exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert model.tasks == ("plain",)


def test_trainer_trains_a_group_and_loads_the_best_checkpoint(tmp_path: Path) -> None:
    model = shared("llama")
    data: Any = [
        {"input_ids": text, "labels": text, "task_ids": i % 3} for i, text in enumerate(rows.texts("llama", [6] * 12))
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        dataloader_pin_memory=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        num_train_epochs=3,
    )
    run = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = run.evaluate()["eval_loss"]
    run.train()
    history = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert min(history) < before
    assert run.evaluate()["eval_loss"] == pytest.approx(min(history), abs=tolerance(min(history)))


def test_a_group_is_copied_and_moved_as_one() -> None:
    model = shared("llama")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "llama", [2, 1]), logits(model, "llama", [2, 1]))
    move(twin)
    twin.remove_task("mnli")
    assert (model.tasks, twin.registry.group("sst2")) == (TASKS, ("qqp", "sst2"))
    twin.to(torch.bfloat16)
    assert twin.prompts["qqp"].shared.prompt.dtype == torch.float32
    plain = SoftPromptModel(tiny.model("llama"), PromptTuningConfig(num_virtual_tokens=3), tasks=["a"])
    assert plain.tasks == ("a",)
