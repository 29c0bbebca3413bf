"""What every task can answer. `sora.tasks.single` and `sora.tasks.multi` are the two that there are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    import keras
    import pandas as pd

TEMPERATURES = (0.25, 10.0)


@dataclass(frozen=True, slots=True)
class Words:
    """What pages and plots call things."""

    accuracy: str
    majority: str  # the most frequent answer
    always: str  # what the figure of the majority means
    probability: str  # axis of the reliability plot
    share: str  # its other axis: what the probability should equal
    answers: tuple[str, ...] = ()  # heading and two paragraphs (HTML), where the page has no confusion matrix


class Task(ABC):
    """One task. It has no state, so two of one class are equal, and any of them may be shared.

    Arrays that the methods take and give:

    - logits: `(clips, classes) float`, before the softmax or sigmoid.
    - owner: `(clips,) int`, the video that each clip belongs to, 0 … videos-1.
    - probabilities: `(videos, classes) float`.
    - targets: what is true of each video or clip, in the form of the task: see `targets`.
    """

    multilabel: ClassVar[bool]  # the field of stored records, see `sora.tasks.of`
    schema: ClassVar[int]  # of a recipe
    stage_suffix: ClassVar[str]  # of the names of the stages that read labels, see `provenance.stages`
    exclusive: ClassVar[bool]  # a class takes from the others: answers can be confused, and labels compared
    words: ClassVar[Words]

    # ---- labels: one string a video ----

    @abstractmethod
    def names(self, label: str) -> list[str]:
        """The classes that a video's label names, sorted."""

    @abstractmethod
    def join(self, names: Iterable[str]) -> str:
        """The label that names these classes; "" for none."""

    @abstractmethod
    def is_class(self, name: str) -> bool:
        """Whether a class may have this name."""

    @abstractmethod
    def single(self, labels: pd.Series) -> pd.Series:
        """One row a class that a label names, instead of one a video, under the index of its video."""

    @abstractmethod
    def known(self, labels: Iterable[str], classes: Sequence[str]) -> np.ndarray:
        """`(videos,) bool`: whether the label names one of `classes`."""

    # ---- targets: labels as numbers ----

    @abstractmethod
    def index(self, label: str, numbers: Mapping[str, int]) -> Any:
        """The number of a label's class or the numbers of its classes, where `numbers` gives each class its own."""

    @abstractmethod
    def targets(self, indices: Iterable[Any], classes: int) -> np.ndarray:
        """What `index` gave for each clip, as one array.

        Output shape: `(clips,) int64`, or `(clips, classes) float32` with 1 for each class that the clip has.
        """

    def encode(self, labels: Iterable[str], classes: Sequence[str]) -> np.ndarray:
        """The targets of these labels, of which each names one of `classes`."""
        numbers = {name: number for number, name in enumerate(classes)}
        return self.targets([self.index(label, numbers) for label in labels], len(classes))

    @abstractmethod
    def dense(self, targets: np.ndarray, classes: int) -> np.ndarray:
        """`(clips, classes) float32`: what the loss compares with, and what mix-up mixes. Mixed targets stay."""

    @abstractmethod
    def mirrored(self, target: np.ndarray, to: Sequence[int]) -> np.ndarray | None:
        """The target of a clip's mirror image; None: it must not be mirrored.

        Args:
            target: of one clip, `()` or `(classes,)`.
            to: the class of each class's mirror image; -1: it has none.
        """

    @abstractmethod
    def class_weights(self, targets: np.ndarray, classes: int) -> np.ndarray:
        """`(classes,) float32`: weights with which every class counts alike, 1 on average over the clips."""

    @abstractmethod
    def weights(self, targets: np.ndarray, class_weights: np.ndarray) -> np.ndarray:
        """`(clips,) float32`, of one clip's target `()`: its weight in the loss."""

    # ---- training ----

    @abstractmethod
    def loss(self, label_smoothing: float) -> keras.losses.Loss:
        """The loss of `(batch, classes)` logits against dense targets."""

    @abstractmethod
    def accuracy(self) -> keras.metrics.Metric:
        """The metric "accuracy": the share of clips whose answer is right in full."""

    # ---- answers ----

    @abstractmethod
    def clip_probabilities(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """`(clips, classes)` logits → as many probabilities, of each clip by itself."""

    def video_probabilities(
        self, logits: np.ndarray, owner: np.ndarray, videos: int, temperature: float = 1.0
    ) -> np.ndarray:
        """`(clips, classes)` logits → `(videos, classes)` probabilities: the mean over a video's clips, as served."""
        clips = self.clip_probabilities(logits, temperature)
        total = np.zeros((videos, clips.shape[1]))
        np.add.at(total, owner, clips)
        return total / np.maximum(np.bincount(owner, minlength=videos), 1)[:, None]

    @abstractmethod
    def are_probabilities(self, row: np.ndarray) -> bool:
        """Whether the numbers of one video or clip, `(classes,)`, can be an answer at all."""

    @abstractmethod
    def answered(self, probabilities: np.ndarray) -> np.ndarray:
        """`(videos, classes) bool`: the classes that are the answer."""

    @abstractmethod
    def labels(self, row: np.ndarray, classes: Sequence[str]) -> tuple[str, ...] | None:
        """All classes that a video is answered with, the likeliest first; None where `label` is all there is to say.

        Args:
            row: the video's probabilities, `(classes,)`.
        """

    @abstractmethod
    def answer_among(self, video: Mapping[str, Any], numbers: Mapping[str, int]) -> set[str]:
        """What a video would be answered with if there were no other classes than these.

        Args:
            video: an entry of `EvalReport.videos`.
            numbers: class → its place among the video's probabilities.
        """

    @abstractmethod
    def log_odds(self, logits: Any, label: Any) -> Any:
        """log(p / (1 - p)) of one class, a tensor `()`, from the `(1, classes)` logits of one clip.

        Args:
            label: the class's number, a tensor `() int32`.
        """

    @abstractmethod
    def margins(self, probabilities: np.ndarray, label: int) -> np.ndarray:
        """`(clips,) float`: how much each clip, of `(clips, classes)` probabilities, speaks for class `label`."""

    # ---- judging ----

    @abstractmethod
    def log_loss(self, probabilities: np.ndarray, targets: np.ndarray) -> float:
        """Mean negative log-likelihood of the videos, in nats."""

    @abstractmethod
    def decisions(self, probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What calibration is about: probabilities, `(n,) float`, and whether what they are of was so, `(n,) bool`."""

    def fit_temperature(self, logits: np.ndarray, owner: np.ndarray, targets: np.ndarray) -> float:
        """The temperature that minimises the videos' negative log-likelihood, within 0.25 to 10; 1.0 without videos.

        Guo et al. 2017, "On Calibration of Modern Neural Networks", with two departures: the likelihood is that of the
        mean over a video's clips, which is what is served; and ln(temperature) has a standard normal prior, worth less
        than one video, without which a validation set of three videos, all right, would drive the answer to the bound.
        """
        if len(targets) == 0:
            return 1.0
        from scipy.optimize import minimize_scalar

        def cost(log_temperature: float) -> float:
            probabilities = self.video_probabilities(logits, owner, len(targets), math.exp(log_temperature))
            return self.log_loss(probabilities, targets) * len(targets) + log_temperature**2 / 2

        low, high = (math.log(bound) for bound in TEMPERATURES)
        return float(math.exp(minimize_scalar(cost, bounds=(low, high), method="bounded").x))

    @abstractmethod
    def mistake(self, row: np.ndarray, target: np.ndarray) -> tuple[float, float]:
        """Of a wrong answer: how confident it was, and the probability that it gave to the truth.

        Args:
            row: the video's probabilities, `(classes,)`.
            target: its truth, `()` or `(classes,)`.
        """

    @abstractmethod
    def averages(self, average_precision: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a report over the average precision of each class that the split holds."""
