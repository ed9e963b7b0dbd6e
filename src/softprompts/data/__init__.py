"""From files to batches: sources give rows, `ExampleTokenizer` encodes them by the task, `collate` makes batches."""

from softprompts.assets.datasets import PACKAGED
from softprompts.data.collation import collate
from softprompts.data.encoding import EncodedExample, ExampleTokenizer
from softprompts.data.sampling import ExampleBatches, TaskBatches, evaluation_order, training_order
from softprompts.data.sources import read_splits
from softprompts.data.task import Task, TaskTemplate, answer_text, classes, decode_answer, load_task, resolve_placement
from softprompts.types import Row

__all__ = [
    "PACKAGED",
    "EncodedExample",
    "ExampleBatches",
    "ExampleTokenizer",
    "Row",
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
