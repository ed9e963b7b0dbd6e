"""Where a prompt starts: every kind of start at every site."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
import tokenizers_tiny
from artifacts import example
from rows import DECODER, INPUT, KV, REPLACE, called
from softprompts import SoftPromptModel, injection
from softprompts import backbone as b
from softprompts.artifacts import artifact
from softprompts.artifacts.vectors import similarity
from softprompts.config import InitConfig, PromptConfig, parse
from softprompts.errors import ArtifactError, BackboneError, ConfigError
from softprompts.model import initialization, peft

P = 12
TOKENIZERS = {"llama": tokenizers_tiny.byte_bpe, "t5": tokenizers_tiny.unigram, "bert": tokenizers_tiny.wordpiece}


def made(name: str) -> b.Backbone:
    """A tiny backbone with a tokenizer of its own kind."""
    tokenizer = TOKENIZERS[name]()
    return b.wrap(tiny.model(name, tokenizer=tokenizer), tokenizer, name=name)


def start(bb: b.Backbone, site: injection.Site = INPUT, length: int = P, seed: int = 0, **values: Any) -> Tensor:
    """The start that a configuration describes; `seed` is the run's, `seed_of_init` the configuration's own."""
    slot = injection.prompt_spec(bb, site, length)
    labels = values.pop("words", ())
    own = values.pop("seed_of_init", None)
    config = InitConfig(**values, seed=own)
    return initialization.initialize(config, bb, site, slot, seed=seed, labels=labels).prompt


def ids_of(bb: b.Backbone, prompt: Tensor) -> list[int]:
    """Which words the rows of an input prompt are, bit for bit."""
    found = [(bb.embed(torch.arange(bb.vocab_size)) == row).all(1).nonzero()[:, 0].tolist() for row in prompt]
    assert all(len(index) == 1 for index in found)
    return [index[0] for index in found]


KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "vocabulary"},
    {"kind": "random"},
    {"kind": "zeros"},
    {"kind": "random", "distribution": "normal"},
    {"kind": "random", "distribution": "uniform"},
    {"kind": "text", "text": "Review: a warm film."},
)


@pytest.mark.parametrize(("name", "site"), rows.cases(tuple(TOKENIZERS)), ids=called)
def test_every_kind_at_every_site(name: str, site: injection.Site) -> None:
    """Shape and dtype fit the slot, nothing wants a gradient, a seed repeats, another seed differs."""
    bb = made(name)
    for values in KINDS:
        first = start(bb, site, **values)
        assert first.shape == (P, injection.prompt_width(bb, site))
        assert first.dtype == torch.float32
        assert first.isfinite().all()
        assert not first.requires_grad
        assert first.equal(start(bb, site, **values))
        assert first.equal(start(bb, site, seed=1, **values)) == (values["kind"] in ("text", "zeros"))
        assert first.eq(0).all() == (values["kind"] == "zeros")


@pytest.mark.parametrize("name", tuple(TOKENIZERS))
def test_random(name: str) -> None:
    """Normal noise with the table's rms, PEFT's N(0, 1), or U(-.5, .5)."""
    bb = made(name)
    table = bb.embed(torch.arange(bb.vocab_size))
    for distribution, rms, top in (
        ("table", float(table.square().mean().sqrt()), None),
        ("normal", 1.0, None),
        ("uniform", 12**-0.5, 0.5),
    ):
        found = start(bb, kind="random", distribution=distribution, length=60)
        assert float(found.square().mean().sqrt()) == pytest.approx(rms, rel=0.05)
        assert float(found.mean()) == pytest.approx(0, abs=0.05 * max(rms, 0.3))
        assert top is None or 0.45 < float(found.abs().max()) <= top


@pytest.mark.parametrize("site", rows.sites("llama"), ids=called)
def test_random_has_the_size_of_words_at_the_site(site: injection.Site) -> None:
    bb = made("llama")
    words = start(bb, site, kind="vocabulary", length=40)
    noise = start(bb, site, kind="random", length=40)
    assert float(noise.square().mean()) == pytest.approx(float(words.square().mean()), rel=0.2)


@pytest.mark.parametrize("name", tuple(TOKENIZERS))
def test_vocabulary_draws_without_replacement_from_the_population(name: str) -> None:
    bb = made(name)
    special = set(bb.tokenizer.all_special_ids)
    common = [i for i in range(bb.vocab_size) if i not in special][:P]
    found = ids_of(bb, start(bb, kind="vocabulary", population=P))
    assert sorted(found) == common
    assert found != common, "drawn, not copied in order"
    wide = [ids_of(bb, start(bb, kind="vocabulary", seed=seed)) for seed in range(20)]
    assert all(len(set(row)) == P for row in wide)
    assert special.isdisjoint(itertools.chain(*wide))
    assert max(itertools.chain(*wide)) > bb.vocab_size // 2


def test_vocabulary_without_a_tokenizer_and_with_padding_rows() -> None:
    """Rows behind the tokenizer's last token are no words."""
    tokenizer = tokenizers_tiny.byte_bpe()
    bare = b.wrap(tiny.model("llama"), name="llama")
    assert max(ids_of(bare, start(bare, kind="vocabulary", length=60))) < tiny.VOCABULARY
    model = tiny.model("llama", tokenizer=range(len(tokenizer) + 40))
    padded = b.wrap(model, tokenizer, name="llama")
    found = [ids_of(padded, start(padded, kind="vocabulary", length=60, seed=seed)) for seed in range(10)]
    assert max(itertools.chain(*found)) < len(tokenizer)


@pytest.mark.parametrize("name", tuple(TOKENIZERS))
def test_text_is_repeated_or_cut(name: str) -> None:
    bb = made(name)
    text = "Review: a warm film."
    ids = bb.tokenizer(text, add_special_tokens=False)["input_ids"]
    for length in (3, len(ids), 2 * len(ids) + 1):
        found = start(bb, kind="text", text=text, length=length)
        assert found.equal(bb.embed(torch.tensor((ids * 3)[:length])))
    special = bb.tokenizer(text)["input_ids"]
    assert initialization.text_ids(bb.tokenizer, text, len(special), special=True).tolist() == special


@pytest.mark.parametrize("name", tuple(TOKENIZERS))
@pytest.mark.parametrize("site", [INPUT, DECODER], ids=called)
def test_labels_are_means_of_pieces_then_common_words(name: str, site: injection.Site) -> None:
    """Row i is the mean of label i's piece embeddings, bit for bit; the rest are different common words."""
    if site == DECODER and name != "t5":
        return
    bb, words = made(name), ("positive", "warmly funny", "negative")
    found = start(bb, site, kind="labels", words=words, population=30)
    for row, word in zip(found, words, strict=False):
        pieces = torch.tensor(bb.tokenizer(word, add_special_tokens=False)["input_ids"])
        assert row.equal(bb.embed(pieces).mean(0))
    assert any(len(bb.tokenizer(word, add_special_tokens=False)["input_ids"]) > 1 for word in words)
    rest = ids_of(bb, found[3:])
    assert len(set(rest)) == P - 3
    common = [i for i in range(bb.vocab_size) if i not in bb.tokenizer.all_special_ids][:30]
    assert set(rest) <= set(common)
    assert start(bb, site, kind="labels", labels=words, length=3).equal(found[:3])


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.MAIN), ids=called)
def test_words_are_what_the_model_makes_of_them(name: str, site: injection.Site) -> None:
    """`from_ids` leaves no hooks, takes no gradient and does not depend on the length that follows (causal)."""
    bb, words = tiny.backbone(name), rows.ids(3, 5)
    found = initialization.from_ids(bb, site, words)
    assert found.shape == (5, injection.prompt_width(bb, site))
    assert not any(layer._forward_pre_hooks for layer in bb.model.modules())
    if bb.family.scores_next_token:
        torch.testing.assert_close(found[:3], initialization.from_ids(bb, site, words[:3]), atol=1e-5, rtol=1e-5)
    found.zero_()
    assert not initialization.from_ids(bb, site, words).eq(0).all()


@pytest.mark.parametrize(
    ("site", "values", "match"),
    [
        (INPUT, {"kind": "vocabulary", "population": 5}, "12 different words are needed, but only 5 can be drawn"),
        (INPUT, {"kind": "text", "text": " "}, "the start text ' ' has no tokens"),
        (INPUT, {"kind": "labels"}, "a start from class labels needs label words"),
        (INPUT, {"kind": "labels", "labels": tuple("abcdefghijklm")}, "13 labels do not fit into a prompt of 12"),
        (INPUT, {"kind": "labels", "labels": ("good", "")}, "the label word '' has no tokens"),
        (REPLACE, {"kind": "labels", "labels": ("good",)}, "for sites input and decoder, not layers; use text"),
        (KV, {"kind": "labels", "labels": ("good",)}, "for sites input and decoder, not kv; use text"),
    ],
    ids=str,
)
def test_errors(site: injection.Site, values: dict[str, Any], match: str) -> None:
    name = "bert" if values.get("text") == " " else "llama"
    with pytest.raises(BackboneError, match=match):
        start(made(name), site, **values)


def test_words_need_a_tokenizer() -> None:
    for values in ({"kind": "text", "text": "a film"}, {"kind": "labels", "labels": ("good",)}):
        with pytest.raises(BackboneError, match="tokenizer"):
            start(tiny.backbone("llama"), **values)


def test_a_sliding_window_holds_no_longer_prefix() -> None:
    with pytest.raises(BackboneError, match="a sliding window of 6 positions cannot hold 6 prompt tokens"):
        initialization.from_ids(tiny.backbone("mistral"), KV, rows.ids(0, 6))
    assert len(initialization.from_ids(tiny.backbone("mistral"), KV, rows.ids(0, 5))) == 5


def test_artifact(tmp_path: Path) -> None:
    """A trained prompt is taken as it is, on the weights, at the site and with the length it was trained for."""
    bb = made("llama")
    prompt = rows.random(0, P, injection.prompt_width(bb, INPUT))
    saved = example(
        prompt=prompt, initial=prompt, state={}, fingerprint=b.fingerprint(bb), config={}, method="prompt-tuning"
    )
    path = str(artifact.save(saved, tmp_path / "prompt"))
    assert start(bb, kind="artifact", path=path).equal(prompt)
    with pytest.raises(ArtifactError, match=r"set prompt\.num_virtual_tokens and prompt\.site to match"):
        start(bb, kind="artifact", path=path, length=P + 1)
    with pytest.raises(ArtifactError):
        start(b.wrap(tiny.model("llama", seed=1, tokenizer=bb.tokenizer), bb.tokenizer), kind="artifact", path=path)


def saved(bb: b.Backbone, path: Path, seed: int, site: injection.Site = INPUT, length: int = P, **changes: Any) -> str:
    """A random prompt as an artifact for `bb`; its directory."""
    prompt = rows.random(seed, length, injection.prompt_width(bb, site))
    facts = {"prompt": prompt, "initial": prompt, "state": {}, "site": site.name, "fingerprint": b.fingerprint(bb)}
    return str(artifact.save(example(**{**facts, **changes}), path))


def test_mean_of_artifacts(tmp_path: Path) -> None:
    """By weights of any sum, or all alike; one artifact is taken bit for bit."""
    bb = made("llama")
    paths = tuple(saved(bb, tmp_path / str(i), i) for i in range(3))
    prompts = [artifact.load(path).prompt for path in paths]
    found = start(bb, kind="mean", paths=paths, weights=(2, 1, 1))
    expected = (prompts[0].double() / 2 + prompts[1].double() / 4 + prompts[2].double() / 4).float()
    assert found.equal(expected)
    assert start(bb, kind="mean", paths=paths).equal(similarity.weighted_mean(prompts))
    assert start(bb, kind="mean", paths=paths[:1], weights=(7,)).equal(prompts[0])


def test_sources(tmp_path: Path) -> None:
    """In the order they are named, beside any kind of start."""
    bb = made("llama")
    paths = tuple(saved(bb, tmp_path / str(i), i) for i in range(3))
    slot = injection.prompt_spec(bb, INPUT, P)
    for kind in ({"kind": "vocabulary"}, {"kind": "artifact", "path": paths[2]}, {"kind": "mean", "paths": paths[1:]}):
        plain = initialization.initialize(InitConfig(**kind), bb, INPUT, slot)
        found = initialization.initialize(InitConfig(**kind, sources=(paths[1], paths[0])), bb, INPUT, slot)
        assert plain.sources is None
        assert found.prompt.equal(plain.prompt)
        assert found.sources.equal(torch.stack([rows.random(i, P, 32) for i in (1, 0)]))


def multitask(bb: b.Backbone, folder: Path, names: Sequence[str] = ("mnli", "qqp"), shared: int = 9) -> Path:
    """Artifacts of tasks that share a prompt, as a run of several tasks leaves them."""
    for i, name in enumerate(names):
        state = {
            "shared.prompt": rows.random(shared, P, 32),
            "columns": rows.random(20 + i, P, 1) + 1,
            "rows": rows.random(30 + i, 1, 32) + 1,
        }
        prompt = state["shared.prompt"] * (state["columns"] @ state["rows"])
        saved(bb, folder / name, 0, prompt=prompt, task=name, method="multitask-prompt-tuning", state=state, options={})
    return folder


def test_multitask_sources(tmp_path: Path) -> None:
    """Columns and rows averaged on their own, those of one task, or ones."""
    bb = made("llama")
    folder, slot = multitask(bb, tmp_path / "prompt"), injection.prompt_spec(bb, INPUT, P)

    def found(path: Path = folder, **values: Any) -> Any:
        return initialization.initialize(InitConfig(kind="multitask", path=str(path), **values), bb, INPUT, slot)

    columns = (rows.random(20, P, 1) + rows.random(21, P, 1)) / 2 + 1
    vectors = (rows.random(30, 1, 32) + rows.random(31, 1, 32)) / 2 + 1
    average = found()
    assert average.prompt.equal(rows.random(9, P, 32))
    torch.testing.assert_close(average.factors[0], columns)
    torch.testing.assert_close(average.factors[1], vectors)
    one = found(factors="task", task="qqp")
    assert one.factors[0].equal(rows.random(21, P, 1) + 1)
    assert found(folder / "qqp").factors[1].equal(one.factors[1])  # a single artifact is its own average
    assert found(factors="ones").factors is None


def test_multitask_sources_that_a_model_saved(tmp_path: Path) -> None:
    """What a SoftPromptModel with shared tasks writes, and PEFT's two files of it alone."""
    bb = made("llama")
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=2, prompt_tuning_init="RANDOM")
    model = SoftPromptModel(bb.model, config, tasks=["mnli", "qqp"], tokenizer=bb.tokenizer)
    with torch.no_grad():
        for number, parameter in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(rows.random(number, *parameter.shape))
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "ours" / name, tmp_path / "theirs")
    slot = injection.prompt_spec(bb, INPUT, P)
    state = model.state_dict()
    columns = torch.stack([value for key, value in state.items() if key.endswith(".columns")]).mean(0)
    for folder in ("ours", "theirs"):
        found = initialization.initialize(InitConfig(kind="multitask", path=str(tmp_path / folder)), bb, INPUT, slot)
        assert found.prompt.equal(next(value for key, value in state.items() if key.endswith("shared.prompt")))
        assert found.factors is not None
        torch.testing.assert_close(found.factors[0], columns)


def test_multitask_sources_that_do_not_fit(tmp_path: Path) -> None:
    bb = made("llama")
    folder = multitask(bb, tmp_path / "prompt")
    plain = saved(bb, tmp_path / "plain", 1)
    mixed = multitask(bb, tmp_path / "mixed", ("a",))
    multitask(bb, tmp_path / "mixed", ("b",), shared=8)
    for path, values, message in (
        (folder, {"factors": "task", "task": "qqqp"}, "has no source task 'qqqp'; did you mean 'qqp'"),
        (plain, {}, "trained with prompt-tuning, which has no shared prompt and factors"),
        (mixed, {}, "a, b do not share one prompt; they come from different runs"),
        (tmp_path / "none", {}, "no directory"),
    ):
        with pytest.raises((ArtifactError, ConfigError), match=message):
            start(bb, kind="multitask", path=str(path), **values)
    with pytest.raises(ArtifactError, match=r"holds a prompt of \[12, 32\] at site input, but the run wants \[6, 32\]"):
        start(bb, kind="multitask", path=str(folder), length=6)
    other = b.wrap(tiny.model("llama", seed=1, tokenizer=bb.tokenizer), bb.tokenizer)
    with pytest.raises(ArtifactError, match="other weights"):
        start(other, kind="multitask", path=str(folder))


@pytest.mark.parametrize("kind", ["sources", "mean"])
def test_artifacts_that_do_not_fit_are_named(tmp_path: Path, kind: str) -> None:
    bb = made("llama")
    good, short = saved(bb, tmp_path / "good", 0), saved(bb, tmp_path / "short", 1, length=P - 1)
    deep = saved(bb, tmp_path / "deep", 2, site=KV)
    text = saved(bb, tmp_path / "text", 3, prompt=None, method="attempt", state={"x": torch.ones(1)})
    other = b.wrap(tiny.model("llama", seed=1, tokenizer=bb.tokenizer), bb.tokenizer)
    away = saved(other, tmp_path / "away", 4)
    wide = saved(made("bert"), tmp_path / "wide", 5)
    for path, message in (
        (short, r"short holds a prompt of \[11, 32\] at site input, but the run wants \[12, 32\] at site input"),
        (deep, r"deep holds a prompt of \[12, 96\] at site kv, but the run wants"),
        (text, "text holds no plain prompt: attempt makes one from each text"),
        (away, "away: .*other weights"),
        (wide, "wide: .*another architecture"),
        (str(tmp_path / "none"), "no directory"),
    ):
        values = {"sources": (good, path)} if kind == "sources" else {"kind": "mean", "paths": (good, path)}
        with pytest.raises(ArtifactError, match=message):
            start(bb, **values)


# Sums of task prompt vectors

LONG = {"kind": "text", "text": "Review: a warm film."}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, artifact.Artifact]:
    """Runs in `runs`: movies and tweets began at one start, sms at another."""
    monkeypatch.chdir(tmp_path)
    bb, found = made("llama"), {}
    for seed, (name, began) in enumerate((("movies", 50), ("tweets", 50), ("sms", 51))):
        place = Path("runs") / name / "prompt"
        saved(bb, place, seed, initial=rows.random(began, P, 32), task=name)
        found[name] = artifact.load(place)
    return found


def difference(found: artifact.Artifact) -> Tensor:
    return found.prompt.double() - found.initial.double()


def test_vector_on_the_common_start(trained: dict[str, artifact.Artifact]) -> None:
    """A single is the trained prompt bit for bit; a sum is computed in float64 and rounded once."""
    bb, began = made("llama"), rows.random(50, P, 32)
    assert start(bb, vector="movies").equal(trained["movies"].prompt)
    assert start(bb, vector="sms").equal(trained["sms"].prompt)
    found = start(bb, vector="movies + 0.5*tweets")
    wanted = began.double() + difference(trained["movies"]) + 0.5 * difference(trained["tweets"])
    torch.testing.assert_close(found, wanted.float(), rtol=2e-7, atol=1e-8)
    assert found.equal(start(bb, vector="0.5*tweets + movies"))
    torch.testing.assert_close(start(bb, vector="-movies"), (began.double() - difference(trained["movies"])).float())
    assert start(bb, vector="movies", seed=3).equal(trained["movies"].prompt), "nothing is drawn"


def test_vector_on_another_start(trained: dict[str, artifact.Artifact]) -> None:
    """Any kind of start, with the sum added to it; kinds that draw follow the seed, and their own."""
    bb = made("llama")
    total = difference(trained["movies"]) - 2 * difference(trained["sms"])
    for values in (
        *KINDS,
        {"kind": "labels", "labels": ("good",)},
        {"kind": "artifact", "path": "runs/sms/prompt"},
        {"kind": "mean", "paths": ("runs/sms/prompt", "runs/movies/prompt")},
        {"kind": "vector", "vector": "tweets"},
    ):
        for seed in (0, 1):
            began = start(bb, seed=seed, **values)
            found = start(bb, seed=seed, vector="movies - 2*sms", start=values)
            torch.testing.assert_close(found, (began.double() + total).float(), rtol=2e-7, atol=1e-8)
    vocabulary = {"kind": "vocabulary"}
    one, other = (start(bb, seed=seed, vector="movies", start=vocabulary) for seed in (0, 1))
    assert not one.equal(other)
    own = {**vocabulary, "seed": 1}
    assert start(bb, seed=0, vector="movies", start=own).equal(other)
    assert start(bb, seed=0, vector="movies", start=vocabulary, seed_of_init=1).equal(other)


def test_vector_on_its_own_start_by_name(trained: dict[str, artifact.Artifact]) -> None:
    """Naming the start that a prompt was trained from gives the prompt bit for bit."""
    bb = made("llama")
    began = start(bb, **LONG)
    saved(bb, Path("runs/own/prompt"), 7, initial=began)
    assert start(bb, vector="own", start=LONG).equal(rows.random(7, P, 32))


def test_vector_keeps_sources(trained: dict[str, artifact.Artifact]) -> None:
    """Beside the sum, as beside any kind; and the words of class labels reach a start that wants them."""
    bb = made("llama")
    slot = injection.prompt_spec(bb, INPUT, P)
    config = InitConfig(vector="movies", start={"kind": "labels"}, sources=("runs/sms/prompt",))
    found = initialization.initialize(config, bb, INPUT, slot, labels=("good", "bad"))
    assert found.sources is not None
    assert found.sources.equal(trained["sms"].prompt[None])
    assert found.parents == (trained["movies"].digest, trained["sms"].digest)
    assert initialization.initialize(InitConfig(), bb, INPUT, slot).parents == ()
    began = start(bb, kind="labels", labels=("good", "bad"))
    torch.testing.assert_close(found.prompt, (began.double() + difference(trained["movies"])).float())


def test_vectors_that_do_not_fit(trained: dict[str, artifact.Artifact]) -> None:
    bb = made("llama")
    saved(bb, Path("runs/text/prompt"), 3, prompt=None, method="attempt", state={"x": torch.ones(1)})
    saved(bb, Path("runs/peft/prompt"), 4, initial=None)
    saved(bb, Path("runs/short/prompt"), 5, length=P - 1)
    saved(bb, Path("runs/deep/prompt"), 6, site=KV)
    for values, message in (
        ({"vector": "movies - sms"}, r"'movies - sms' did not all begin at the same start; set init\.start"),
        ({"vector": "movies - movies"}, r"the sum 'movies - movies' is zero, .* set init\.start"),
        ({"vector": "text"}, "text holds no plain prompt: attempt makes one from each text"),
        ({"vector": "peft"}, "softprompts vector make peft --start START --out DIRECTORY"),
        ({"vector": "films"}, r"no trained prompt 'films' \(looked for films"),
        ({"vector": "movies tweets"}, r"after 'movies' there should be `\+` or `-`, found 'tweets'"),
        (
            {"vector": "movies + short"},
            r"movies and short cannot be combined: their shape is \[12, 32\] and \[11, 32\]",
        ),
        ({"vector": "movies + deep"}, "movies and deep cannot be combined"),
        ({"vector": "2*short"}, r"2\*short holds a prompt of \[11, 32\] at site input, but the run wants \[12, 32\]"),
        ({"vector": "deep"}, r"deep holds a prompt of \[12, 96\] at site kv, but the run wants"),
        (
            {"vector": "movies", "start": {"kind": "artifact", "path": "runs/short/prompt"}},
            "short/prompt holds a prompt",
        ),
    ):
        with pytest.raises((ArtifactError, ConfigError), match=message):
            start(bb, **values)
    other = b.wrap(tiny.model("llama", seed=1, tokenizer=bb.tokenizer), bb.tokenizer)
    for values in ({}, {"start": {"kind": "vocabulary"}}):
        with pytest.raises(ArtifactError, match=r"movies: .*other weights"):
            start(other, vector="movies", **values)
    slot = injection.prompt_spec(other, INPUT, P)
    allowed = initialization.initialize(InitConfig(vector="movies"), other, INPUT, slot, allow_other_weights=True)
    assert allowed.prompt.equal(trained["movies"].prompt)


def test_a_vector_needs_no_kind() -> None:
    """And what was read once, with its kind, is read again from results.json."""
    found = parse({"init": {"vector": "a + b", "start": {"kind": "text", "text": "x"}}}, PromptConfig).init
    assert (found.kind, found.vector, found.seed) == ("vector", "a + b", None)
    assert found.start == InitConfig(kind="text", text="x")
    assert parse({"init": found.model_dump(mode="json")}, PromptConfig).init == found
    assert parse({"init": {"seed": 3}}, PromptConfig).init.kind == "vocabulary"


@pytest.mark.parametrize("values", KINDS, ids=lambda values: values["kind"])
def test_a_seed_of_its_own_fixes_the_draw(values: dict[str, Any]) -> None:
    """Whatever the run's seed is; 0 is a seed too."""
    bb = made("llama")
    for own in (0, 5):
        wanted = start(bb, seed=own, **values)
        for seed in (0, 1, 5):
            assert start(bb, seed=seed, seed_of_init=own, **values).equal(wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vector"}, "init kind 'vector' needs init.vector, a sum such as"),
        ({"kind": "text", "text": "x", "vector": "a"}, "init.vector is for kind vector, not text; leave one of them"),
        ({"start": {"kind": "vocabulary"}}, "init.start is for kind vector, not vocabulary"),
        ({"vector": "a", "start": {"kind": "text"}}, "init kind 'text' needs init.text"),
        ({"vector": "a", "start": {"kind": "vocabolary"}}, "init.start.kind"),
        ({"vector": "a", "start": {"sed": 1}}, "unknown key 'init.start.sed'; did you mean 'seed'"),
        ({"vektor": "a"}, "unknown key 'init.vektor'; did you mean 'vector'"),
        ({"seed": -1}, "init.seed"),
        ({"seed": "x"}, "init.seed"),
        ({"kind": "mean"}, "init kind 'mean' needs init.paths"),
        ({"kind": "mean", "paths": ["a", "b"], "weights": [1]}, "1 numbers for 2 init.paths; give one for each path"),
        (
            {"kind": "mean", "paths": ["a", "b"], "weights": [1, -1]},
            r"init.weights.1: .* greater than or equal to 0 \(given: -1\)",
        ),
        ({"kind": "mean", "paths": ["a", "b"], "weights": [0, 0]}, "init.weights must not all be 0"),
        (
            {"kind": "mean", "paths": ["a"], "weights": [float("nan")]},
            r"init.weights.0: .* finite number \(given: nan\)",
        ),
        ({"kind": "meen", "paths": ["a"]}, "'artifact', 'mean', 'multitask' or 'vector' .*did you mean 'mean'"),
        ({"source": ["a"]}, "unknown key 'init.source'; did you mean 'sources'"),
    ],
)
def test_what_a_configuration_may_not_say(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"init": values}, PromptConfig)


def test_peers_word_embeddings() -> None:
    """Words come from the input embeddings, not from the first tensor with as many rows as the vocabulary."""
    bb = made("llama")
    decoy = torch.nn.Parameter(torch.zeros(bb.vocab_size, 32))
    first = next(iter(bb.model.model._modules.values()))
    bb.model.model._modules.pop("embed_tokens")
    bb.model.model.register_parameter("decoy", decoy)
    bb.model.model.add_module("embed_tokens", first)
    found = start(bb, kind="vocabulary")
    assert len(ids_of(bb, found)) == P
    assert bool((found.abs().sum(1) > 0).all())
