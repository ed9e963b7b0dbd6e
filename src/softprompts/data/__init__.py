"""From files to batches: sources give rows, a task gives them words, an encoder tokens, collate batches."""

from softprompts.data.collate import Batches, collate, evaluation_order, order
from softprompts.data.encode import Encoded, Encoder
from softprompts.data.packaged import PACKAGED, Packaged
from softprompts.data.sampling import TaskBatches
from softprompts.data.sources import read
from softprompts.data.splits import Splits
from softprompts.data.task import Format, Task, answer, classes, decode_answer, load, place_of
from softprompts.data.template import DataError, Row

__all__ = [
    "PACKAGED",
    "Batches",
    "DataError",
    "Encoded",
    "Encoder",
    "Format",
    "Packaged",
    "Row",
    "Splits",
    "Task",
    "TaskBatches",
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
