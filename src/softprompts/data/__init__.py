"""From files to batches: sources give rows, a task gives them words, an encoder tokens, collate batches."""

from softprompts.assets.datasets import PACKAGED, PackagedDataset
from softprompts.data.collation import ExampleBatches, collate, evaluation_order, training_order
from softprompts.data.encoding import EncodedExample, ExampleTokenizer
from softprompts.data.sampling import TaskBatches
from softprompts.data.sources import read_splits
from softprompts.data.splits import Splits
from softprompts.data.task import Task, TaskTemplate, answer_text, classes, decode_answer, load_task, resolve_placement
from softprompts.types import Row

__all__ = [
    "PACKAGED",
    "EncodedExample",
    "ExampleBatches",
    "ExampleTokenizer",
    "PackagedDataset",
    "Row",
    "Splits",
    "Task",
    "TaskBatches",
    "TaskTemplate",
    "answer_text",
    "classes",
    "collate",
    "decode_answer",
    "evaluation_order",
    "load_task",
    "read_splits",
    "resolve_placement",
    "training_order",
]
