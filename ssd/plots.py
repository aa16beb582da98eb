"""Pictures of an evaluation: precision-recall curves, a confusion matrix, the images with most mistakes.

And of a run: its losses, learning rate and AP. And of a calibration.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ImageDraw

from ssd.backends import Options
from ssd.calibration import Reliability
from ssd.data.annotations import Annotations
from ssd.detections import Detections
from ssd.drawing import encoded
from ssd.errors import MissingExtra
from ssd.evaluate import CROWD, FOUND_AT, finds, run_coco
from ssd.images import load_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE_THRESHOLD = Options.score_threshold  # of what counts as detected in the matrix and on the images
_WORST = 8
_MOST_MARKERS = 40  # on a curve
_CURVES = {
    "loss": {"loss": "sum", "conf_loss": "conf", "loc_loss": "loc"},
    "learning rate at the epoch's end": {"lr": "rate"},
    "AP on val": {"AP50": "AP50", "AP": "AP"},
}
"""Of a run: by the title of a picture, columns and what they are called there."""

_MOST_CLASSES = 30  # that can be told apart in one picture


class Mistakes(NamedTuple):
    """What an image's detections and boxes come to."""

    pairs: list[tuple[int, int]]
    """Class of the box and of the detection, from 0; the number of classes stands for none."""
    missed: npt.NDArray[np.float64]
    """Boxes that nothing detected, xyxy, ``[K, 4]``."""

    def number(self) -> int:
        """Wrong, missed and surplus detections."""
        return sum(truth != detected for truth, detected in self.pairs)


def draw_plots(annotations: Annotations, found: Mapping[int, Detections]) -> dict[str, memoryview]:
    """The contents of ``precision_recall.png``, ``confusion.png`` and ``worst/*.jpg``, by these names.

    Raises:
        MissingExtra: matplotlib is not installed; the message names the command.
    """
    require_matplotlib()
    mistakes = {i: compare(annotations, i, each) for i, each in found.items()}
    contents = {
        "precision_recall.png": _png(_curves(annotations, found)),
        "confusion.png": _png(_matrix(annotations, list(mistakes.values()))),
    }
    worst = sorted(mistakes, key=lambda i: -mistakes[i].number())[:_WORST]
    for rank, i in enumerate(worst, start=1):
        if mistakes[i].number():
            stem = os.fsencode(Path(str(annotations.file_names[i])).stem)[:200]
            name = f"worst/{rank}-{os.fsdecode(stem)}.jpg"
            contents[name] = _draw_mistakes(annotations, i, found[i], mistakes[i])
    return contents


def require_matplotlib() -> None:
    """Require what the pictures are drawn with.

    Raises:
        MissingExtra: it is not installed; the message names the command.
    """
    try:
        import matplotlib.figure  # noqa: PLC0415, F401
    except ImportError as error:
        raise MissingExtra("plots") from error


def draw_curves(history: Sequence[Mapping[str, float]]) -> memoryview:
    """The content of ``curves.png``: losses, learning rate and AP over the epochs of a run.

    Args:
        history: a row for each epoch, from the first on, by the names of the columns of ``metrics.csv``.

    Raises:
        MissingExtra: matplotlib is not installed; the message names the command.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(14, 4), layout="constrained")
    all_axes = figure.subplots(1, 3)
    for axes, (title, lines) in zip(all_axes, _CURVES.items(), strict=True):
        for name, label in lines.items():
            # An AP is not in all rows, and -1 where there was nothing to measure.
            known = [
                (epoch, row[name]) for epoch, row in enumerate(history, start=1) if row.get(name, -1) >= 0
            ]
            if known:
                marker = "o" if len(known) <= _MOST_MARKERS else None
                axes.plot(*zip(*known, strict=True), label=label, marker=marker, markersize=4, linewidth=1.8)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, len(history) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        axes.margins(y=0.08)
        axes.update_datalim([(0, 0)])  # the axis begins at 0, and nothing is cut off above
        axes.autoscale_view(scalex=False)
        axes.set_ylim(bottom=0)
        if len(axes.lines) > 1:
            axes.legend()
        elif not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    return _png(figure)


def draw_reliability(before: Reliability, after: Reliability, title: str) -> memoryview:
    """A reliability diagram: how often detections find an object, by the score, and by the probability.

    Args:
        before: of scores.
        after: of the probabilities that are made of them.
        title: what they are of.

    Raises:
        MissingExtra: matplotlib is not installed; the message names the command.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6.5, 7), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    axes.plot(
        (0, 1), (0, 1), color="0.6", linestyle="--", linewidth=1.2, label="calibrated: the two are equal"
    )
    for each, color, name in ((before, "tab:orange", "score"), (after, "tab:blue", "calibrated")):
        label = f"{name}: expected calibration error {each.error:.3f}"
        axes.plot(
            each.probability, each.hits, color=color, marker="o", markersize=5, linewidth=1.8, label=label
        )
        counts.bar(each.probability, each.counts, width=0.028, color=color, alpha=0.6)
    axes.set(ylabel="detections that find an object", ylim=(-0.02, 1.02), title=title)
    figure.legend(loc="outside lower center")
    counts.set(xlabel="score or probability", ylabel="detections", yscale="log", xlim=(-0.02, 1.02))
    for each_axes in (axes, counts):
        each_axes.grid(alpha=0.3)
    return _png(figure)


def _png(figure: "Figure") -> memoryview:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120, bbox_inches="tight")
    return drawn.getbuffer()


def compare(annotations: Annotations, i: int, found: Detections) -> Mistakes:
    """Pair an image's detections with the boxes that they find, of whatever class; see `finds`.

    Crowd boxes, and detections on them, are left aside.
    """
    part, none = annotations.of_image(i), len(annotations.class_names)
    labels, free = annotations.labels[part] - 1, ~annotations.crowd[part]
    sure = found[(found.scores >= SCORE_THRESHOLD).tolist()]
    pairs: list[tuple[int, int]] = []
    for number, class_id in zip(finds(annotations, i, sure, of_any_class=True), sure.class_ids, strict=True):
        if number >= 0:
            free[number - part.start] = False
        if number != CROWD:
            pairs.append((int(labels[number - part.start]) if number >= 0 else none, int(class_id)))
    pairs += [(int(label), none) for label in labels[free]]
    return Mistakes(pairs, annotations.boxes[part][free])


def _curves(annotations: Annotations, found: Mapping[int, Detections]) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415

    precision = run_coco(annotations, found).eval["precision"][0, :, :, 0, 2]  # IoU 0.5: [recall, class]
    recall = np.linspace(0, 1, len(precision))
    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    known = [k for k in range(precision.shape[1]) if (precision[:, k] > -1).any()]
    for k in sorted(known, key=lambda k: -precision[:, k].mean())[:_MOST_CLASSES]:
        label = f"{annotations.class_names[k]}  {precision[:, k].mean():.3f}"
        axes.plot(recall, precision[:, k], linewidth=1.2, label=label)
    if known:
        mean = precision[:, known].mean(1)
        axes.plot(recall, mean, "k", linewidth=2.5, label=f"all  {mean.mean():.3f}")
        axes.legend(title="AP50", fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="IoU 0.5")
    axes.grid(alpha=0.3)
    return figure


def _matrix(annotations: Annotations, mistakes: list[Mistakes]) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415

    size = len(annotations.class_names) + 1
    counts = np.zeros((size, size), np.int64)
    for each in mistakes:
        for truth, detected in each.pairs:
            counts[truth, detected] += 1
    # Of many classes, those that take part in most mistakes.
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-(wrong.sum(0) + wrong.sum(1))[:-1], kind="stable")[:_MOST_CLASSES]
    shown = [*sorted(order.tolist()), size - 1]
    part = counts[np.ix_(shown, shown)]
    share = part / np.maximum(counts[shown].sum(1, keepdims=True), 1)
    names = [*annotations.class_names, ""]
    side = 2.5 + 0.45 * len(shown)
    figure = Figure(figsize=(side + 1, side))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(shown)):
        for column in range(len(shown)):
            if part[row, column]:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(
                    column, row, str(part[row, column]), ha="center", va="center", color=color, fontsize=8
                )
    ticks = range(len(shown))
    columns, rows = [names[k] for k in shown], [names[k] for k in shown]
    columns[-1], rows[-1] = "(missed)", "(nothing there)"
    axes.set_xticks(ticks, columns, rotation=60, ha="right")
    axes.set_yticks(ticks, rows)
    axes.set(xlabel="detected", ylabel="truth", title=f"score {SCORE_THRESHOLD} or more, IoU {FOUND_AT}")
    return figure


def _draw_mistakes(annotations: Annotations, i: int, found: Detections, mistakes: Mistakes) -> memoryview:
    """The detections as usual, and what was missed in white, crossed out."""
    image = load_image(annotations.path(i))
    pencil = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 300))
    low, high = (pick(mistakes.missed[:, :2], mistakes.missed[:, 2:]) for pick in (np.minimum, np.maximum))
    for left, top, right, bottom in np.hstack([low, high]).tolist():  # a truth may be inverted
        pencil.rectangle((left, top, right, bottom), outline="white", width=width)
        pencil.line((left, top, right, bottom), fill="white", width=width)
        pencil.line((left, bottom, right, top), fill="white", width=width)
    sure = found[(found.scores >= SCORE_THRESHOLD).tolist()]
    return encoded(replace(sure, image=image).draw())
