"""What users write: a plain PyTorch loop and transformers' Trainer, over `SoftPromptModel` and over PEFT."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import softprompts
from benchmarks import models, workload
from benchmarks.measure import interleave, ratio, relative, timed
from benchmarks.ours import Ours
from benchmarks.theirs import RATE, Theirs
from benchmarks.workload import IGNORE, Row, Shape

TRAINER_STEPS = 1
"""Steps of one call of Trainer; a round counts with the mean of their times."""


def padded(rows: Sequence[Row], device: str) -> dict[str, Tensor]:
    """The rows as a data collator makes them: ids, mask and labels [B, T], padded on the right."""
    ids = [torch.tensor(row.ids) for row in rows]
    labels = [torch.tensor(row.labels) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }
    return {name: value.to(device) for name, value in batch.items()}


def public_model(model: str, dtype: str, device: str, prompt: int) -> Any:
    """A `SoftPromptModel` as the README makes it, in training mode, its prompt at the workload's start."""
    if models.is_random(model):
        stock = models.randomly(model, dtype, device)
    else:
        stock = transformers.AutoModelForCausalLM.from_pretrained(models.path(model), dtype=getattr(torch, dtype))
        stock.to(device)
    config = softprompts.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt)
    prompted = softprompts.SoftPromptModel(stock, config)
    ids = workload.start_ids(prompt, stock.get_input_embeddings().weight.shape[0])
    (parameter,) = trained(prompted)
    with torch.no_grad():
        parameter.copy_(stock.get_input_embeddings()(torch.tensor(ids, device=device)))
    return prompted.train()


def trained(model: Any) -> list[Tensor]:
    """The parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_step(model: Any, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """One step of the loop that everybody writes."""
    optimizer = torch.optim.AdamW(trained(model), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


class StepTimes(transformers.TrainerCallback):  # type: ignore[misc]
    """The seconds of each optimizer step of Trainer, without its set-up."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock; arguments are those of transformers' callbacks."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock; arguments are those of transformers' callbacks."""
        self.seconds.append(time.perf_counter() - self.began)


def trainer_steps(
    model: Any, batch: Mapping[str, Tensor], folder: str, device: str, means: list[float]
) -> Callable[[], None]:
    """A call that trains `TRAINER_STEPS` steps with transformers' Trainer; it adds their mean seconds to `means`."""
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]
    arguments = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=len(rows),
        max_steps=TRAINER_STEPS,
        learning_rate=RATE,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
    )

    def train() -> None:
        times = StepTimes()
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[times])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        means.append(statistics.fmean(times.seconds))

    return train


def loops(model: str, device: str, dtype: str, shape: Sequence[int], pairs: int) -> dict[str, Any]:
    """Steps of the command's path, of a plain loop and of Trainer, over ours and over PEFT, in turns on one batch."""
    size = Shape(*shape)
    command, theirs = Ours(model, dtype, device, size.prompt), Theirs(model, dtype, device, size.prompt)
    ids = workload.start_ids(size.prompt, command.backbone.vocab_size)
    rows = workload.rows(size, command.backbone.vocab_size, "causal")
    command.start(ids)
    theirs.start(ids)
    command_batch, batch = command.prepare(rows), padded(rows, device)
    prompted = public_model(model, dtype, device, size.prompt)
    means: dict[str, list[float]] = {"Trainer": [], "PEFT Trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], None]] = {
            "command": lambda: command.step(command_batch),
            "loop": plain_step(prompted, batch),
            "Trainer": trainer_steps(prompted, batch, folder, device, means["Trainer"]),
            "PEFT loop": lambda: theirs.step(batch),
            "PEFT Trainer": trainer_steps(theirs.model, batch, folder, device, means["PEFT Trainer"]),
        }
        for name in ("command", "loop", "PEFT loop"):
            calls[name]()
        (prompt,) = trained(prompted)
        assert prompt.grad is not None
        gradient = relative(prompt.grad.float().cpu(), theirs.gradient())
        seconds = interleave(calls, pairs, device, lambda done: _progress(f"round {done} of {pairs}"))
    seconds |= means
    return {
        "model": model,
        "dtype": dtype,
        "shape": asdict(size),
        "pairs": pairs,
        "medians": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": seconds,
        "gradient": gradient,
        "kernels": {"command": command.kernels, "loop": str(prompted.backbone.kernels)},
        "ratios": {
            "loop of command": asdict(ratio(seconds["command"], seconds["loop"])),
            "Trainer of command": asdict(ratio(seconds["command"], seconds["Trainer"])),
            "PEFT loop to loop": asdict(ratio(seconds["PEFT loop"], seconds["loop"])),
            "PEFT Trainer to Trainer": asdict(ratio(seconds["PEFT Trainer"], seconds["Trainer"])),
        },
    }


def busy(model: str, device: str, dtype: str, shape: Sequence[int], pairs: int) -> dict[str, Any]:
    """Steps of the command's path on a quiet machine and beside one busy core, in turns.

    How threads wait is fixed when a process starts: `OMP_WAIT_POLICY` is part of the measurement's environment.
    """
    size = Shape(*shape)
    command = Ours(model, dtype, device, size.prompt)
    command.start(workload.start_ids(size.prompt, command.backbone.vocab_size))
    batch = command.prepare(workload.rows(size, command.backbone.vocab_size, "causal"))
    command.step(batch)
    seconds: dict[str, list[float]] = {"quiet": [], "busy": []}
    for number in range(pairs):
        seconds["quiet"].append(timed(lambda: command.step(batch), device))
        with busy_core():
            seconds["busy"].append(timed(lambda: command.step(batch), device))
        _progress(f"pair {number + 1} of {pairs}")
    return {
        "model": model,
        "dtype": dtype,
        "shape": asdict(size),
        "pairs": pairs,
        "seconds": seconds,
        "medians": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": asdict(ratio(seconds["busy"], seconds["quiet"])),
    }


@contextmanager
def busy_core() -> Any:
    """Keep one core busy with a process that computes without a pause."""
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbor.kill()
        neighbor.wait()


def _progress(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)
