"""PEFT's side of the measurements, as its documentation trains a prompt; no other module calls PEFT."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import models
from benchmarks.workload import IGNORE, Row

RATE = 1e-3
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "sequence": "SEQ_CLS"}


class Theirs:
    """`get_peft_model(PromptTuningConfig(...))` on the same model; a `workload.Side`.

    attention: transformers' implementation; None is the model's default. Training builds no cache, which PEFT's
    documentation leaves to transformers' Trainer.
    """

    def __init__(self, model: str, dtype: str, device: str, prompt: int, attention: str | None = None) -> None:
        self.kind, self.device, self.loss = models.kind(model), device, float("nan")
        base = _load(model, dtype, device, attention)
        self.tokenizer = models.tokenizer(model) if self.kind == "causal" else None
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        # Of an encoder-decoder PEFT makes two prompts and trains the first; here it makes one.
        config = peft.PromptTuningConfig(
            task_type=TASKS[self.kind],
            num_virtual_tokens=prompt,
            num_transformer_submodules=1,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models without a name
            self.model: Any = peft.get_peft_model(base, config).train()
        self.embedding = base.get_input_embeddings()

    @property
    def attention(self) -> str:
        """The attention implementation that the model runs with."""
        return str(self.model.get_base_model().config._attn_implementation)

    @property
    def weight(self) -> Any:
        """The prompt [P, H]."""
        return self.model.prompt_encoder["default"].embedding.weight

    def start(self, ids: Sequence[int]) -> None:
        """See `workload.Side`."""
        with torch.no_grad():
            self.weight.copy_(self.embedding(torch.tensor(ids, device=self.device)))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=RATE)

    def prepare(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """See `workload.Side`; padded on the right, labels of padding ignored."""
        ids = [torch.tensor(row.ids) for row in rows]
        labels = (
            torch.tensor([row.labels for row in rows])
            if self.kind == "sequence"
            else pad_sequence([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=IGNORE)
        )
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": labels,
        }
        return {name: value.to(self.device) for name, value in batch.items()}

    def step(self, batch: dict[str, Tensor]) -> None:
        """See `workload.Side`."""
        self.optimizer.zero_grad()
        options = {} if self.kind == "sequence" else {"use_cache": False}
        loss = self.model(**batch, **options).loss
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())

    def gradient(self) -> Tensor:
        """See `workload.Side`."""
        gradient: Tensor = self.weight.grad
        return gradient.float().cpu()

    def touch(self) -> None:
        """See `workload.Side`."""
        with torch.no_grad():
            self.model.get_base_model()(input_ids=torch.ones(1, 1, dtype=torch.long, device=self.device))

    def score(self, texts: Sequence[str], labels: dict[str, list[int]], size: int) -> Tensor:
        """See `workload.Side`. All labels of one token come from one pass, each longer one from a separate pass.

        Batches are of similar length, only the last positions reach the vocabulary where the model allows it, and
        a label's last token is not read, as nothing follows it.
        """
        assert self.tokenizer is not None
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        names = list(labels)
        singles = [name for name in names if len(labels[name]) == 1]
        log_probs = torch.empty(len(texts), len(names), dtype=torch.float64)
        groups = ([singles] if singles else []) + [[name] for name in names if name not in singles]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        self.model.eval()
        with torch.inference_mode():
            for group in groups:
                answers = torch.tensor([labels[name] for name in group], device=self.device)  # [labels, tokens]
                columns = torch.tensor([names.index(name) for name in group])
                for at in range(0, len(order), size):
                    index = order[at : at + size]
                    batch_log_probs = self._log_probs([ids[i] for i in index], answers)
                    log_probs[torch.tensor(index)[:, None], columns] = batch_log_probs.double().cpu()
        self.model.train()
        return log_probs

    def _log_probs(self, texts: list[list[int]], answers: Tensor) -> Tensor:
        """Log-probability [rows, labels] of `answers` [labels, tokens]: many of one token, or one of several."""
        read = answers[0, :-1].tolist()
        rows = [torch.tensor(text + read) for text in texts]
        first = torch.tensor([len(text) - 1 for text in texts], device=self.device)
        batch = {
            "input_ids": pad_sequence(rows, batch_first=True).to(self.device),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device),
        }
        longest = batch["input_ids"].shape[1]
        scored = longest - int(first.min())
        options = {"logits_to_keep": scored} if self.takes_logits_to_keep else {}
        logits = self.model(**batch, use_cache=False, **options).logits[:, -scored:]
        tokens = answers.shape[1]
        places = first[:, None] - (longest - scored) + torch.arange(tokens, device=self.device)
        chosen = logits[torch.arange(len(texts), device=self.device)[:, None], places].float().log_softmax(-1)
        if tokens == 1:
            return chosen[:, 0, answers[:, 0]]
        return chosen.gather(2, answers[0].expand(len(texts), -1)[..., None])[..., 0].sum(1, keepdim=True)


def _load(model: str, dtype: str, device: str, attention: str | None) -> Any:
    if models.is_random(model):
        return models.randomly(model, dtype, device, attention)
    options = {} if attention is None else {"attn_implementation": attention}
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(models.path(model), dtype=getattr(torch, dtype), **options).to(device)
