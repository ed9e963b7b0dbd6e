"""From files to batches: sources give rows, a task gives them words, an encoder tokens, collate batches."""

from softprompts.assets.datasets import PACKAGED, Packaged
from softprompts.data.collation import ExampleBatches, collate, evaluation_order, order
from softprompts.data.encoding import EncodedExample, ExampleTokenizer
from softprompts.data.sampling import TaskBatches
from softprompts.data.sources import read
from softprompts.data.splits import Splits
from softprompts.data.task import Task, TaskTemplate, answer, classes, decode_answer, load, place_of
from softprompts.types import Row

__all__ = [
    "PACKAGED",
    "EncodedExample",
    "ExampleBatches",
    "ExampleTokenizer",
    "Packaged",
    "Row",
    "Splits",
    "Task",
    "TaskBatches",
    "TaskTemplate",
    "answer",
    "classes",
    "collate",
    "decode_answer",
    "evaluation_order",
    "load",
    "order",
    "place_of",
    "read",
]
