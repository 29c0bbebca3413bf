"""What a classifier is asked about a video: one class (`SINGLE`) or any number of them (`MULTI`).

A `Task` answers every question on which the two differ, from reading a label to the words of a page, so that no other
room asks which one it has. Records that are stored say it with the field `multilabel`; `of` makes the task of it.

Importing this room loads NumPy and no Keras.
"""

from sora.tasks.multi import MultiLabel
from sora.tasks.single import SingleLabel
from sora.tasks.task import Task, Words

SINGLE = SingleLabel()
MULTI = MultiLabel()

__all__ = ["MULTI", "SINGLE", "MultiLabel", "SingleLabel", "Task", "Words", "of"]


def of(multilabel: bool) -> Task:
    """The task of a recipe, a report or a job, from its field `multilabel`."""
    return MULTI if multilabel else SINGLE
