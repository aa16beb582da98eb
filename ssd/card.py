"""The model card of weights on the Hugging Face Hub: what is known of them, and nothing else."""

import csv
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ssd.checkpoint import Checkpoint
from ssd.errors import CheckpointError, MissingExtra, as_line
from ssd.evaluate import MEANINGS, METRICS
from ssd.pretrained import PUBLISHED, weights_in

_MOST_CLASSES = 200  # that are listed
_NO_LICENCE = "Not given: ask the owner before using these weights."


@dataclass(frozen=True)
class Measured:
    """What weights reached on a dataset."""

    metrics: dict[str, float]
    """By names of `ssd.evaluate.METRICS`, in [0, 1]."""
    data: str
    split: str
    how: str
    """By what it was measured, for people."""
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    """As in `ssd.evaluate.Evaluation`."""


def measured_in(file: Path, class_names: tuple[str, ...]) -> Measured:
    """What ``ssd evaluate`` wrote into its ``metrics.json``.

    Raises:
        CheckpointError: it is another file, or of other classes.
    """
    try:
        facts = json.loads(file.read_bytes())
        metrics = {name: float(facts["metrics"][name]) for name in METRICS}
        per_class = {str(name): {"AP": float(row["AP"])} for name, row in facts["per_class"].items()}
        data, split = _base(str(facts["data"])), str(facts["split"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no metrics.json that ssd evaluate wrote ({error!r})") from error
    if tuple(per_class) != class_names:
        raise CheckpointError(f"{file} was measured with other classes than those of the weights")
    return Measured(metrics, data, split, f"`ssd evaluate`, {facts.get('images', '?')} images", per_class)


def measured_in_run(weights: Path, data: str) -> Measured | None:
    """What training measured of the best or the last weights of a run folder; None if that is not known."""
    try:
        with (weights.parent / "metrics.csv").open(newline="") as file:
            rows = [
                {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    rows = [row for row in rows if row.get("AP", -1) >= 0]
    if not rows or weights.name not in ("best.safetensors", "last.safetensors"):
        return None
    row = max(rows, key=lambda row: row["AP"]) if weights.name == "best.safetensors" else rows[-1]
    how = "during training, by the epoch's evaluation"
    return Measured({name: row[name] for name in METRICS if row.get(name, -1) >= 0}, data, "val", how)


def data_of_run(weights: Path) -> str:
    """The name of the dataset of the run folder that weights are in; empty if that is not known."""
    try:
        return _base(str(json.loads((weights.parent / "config.json").read_bytes())["data"]["data"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def accuracy_of(weights: str | os.PathLike[str]) -> str:
    """What weights reached, as published or as their run folder says; empty if that is not known.

    Args:
        weights: as for `ssd.load_model`.

    >>> accuracy_of("coco")
    '0.25 AP on COCO val2017, as published by NVIDIA'
    """
    if (record := PUBLISHED.get(os.fspath(weights))) is not None:
        return record.accuracy
    path = Path(weights)
    path = weights_in(path) if path.is_dir() else path
    data = data_of_run(path)
    if (measured := measured_in_run(path, data)) is None:
        return ""
    named = ", ".join(
        f"{measured.metrics[name]:.3f} {name}" for name in ("AP", "AP50") if name in measured.metrics
    )
    return f"{named} on the {measured.split} split of {data or 'its dataset'}, {measured.how}"


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of which paths of this machine keep only their last part."""
    return {
        key: _base(value) if isinstance(value, str) and (os.path.isabs(value) or "\\" in value) else value
        for key, value in config.items()
    }


def _base(path: str) -> str:
    return PurePosixPath(path.rstrip("/")).name if "\\" not in path else PureWindowsPath(path).name


def model_card(
    found: Checkpoint, repo: str, *, data: str, measured: Measured | None, license: str | None
) -> str:
    """The card, Markdown with the front matter that the Hub reads.

    Args:
        found: the weights.
        repo: owner and name on the Hub.
        data: name of the dataset that they were trained on; empty if that is not known.
        measured: what they reached; None if that is not known.
        license: as the Hub calls it, such as "apache-2.0".

    Raises:
        MissingExtra: huggingface_hub is not installed.
    """
    name, size = repo.partition("/")[2], found.layout.size
    names = found.class_names
    listed = ", ".join(map(_text, names[:_MOST_CLASSES]))
    listed += f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    learned = _text(data) if data else "Not recorded in these weights."
    parts = [
        f"# {_text(name)}",
        f"Finds {len(names)} {'class' if len(names) == 1 else 'classes'} of objects in images: an SSD "
        f"([Liu et al., 2016](https://arxiv.org/abs/1512.02325)) of {size} x {size} pixels with a "
        f"{found.backbone} trunk. Weights of [ssd300](https://pypi.org/project/ssd300/).",
        f"```sh\npip install 'ssd300[hub]'\nssd detect photo.jpg --weights hf://{repo}\n```",
        f'```python\nimport ssd\n\ndetector = ssd.Detector.load("hf://{repo}")\nprint(detector("photo.jpg"))\n```',
        f"## Classes\n\n{listed}",
        f"## Training data\n\n{learned}",
        f"## Recipe\n\n{_recipe(found)}",
        f"## Metrics\n\n{_metrics(measured)}",
        f"## Limits\n\n{_limits(found, measured)}",
        f"## Licence\n\n{_text(license) if license else _NO_LICENCE}",
    ]
    return f"---\n{_front_matter(name, data, measured, license)}---\n\n" + "\n\n".join(parts) + "\n"


def _recipe(found: Checkpoint) -> str:
    config = without_paths(found.config)
    if not config:
        return "Not recorded in these weights."
    rows = "\n".join(f"| {_text(key)} | {_text(str(value))} |" for key, value in config.items())
    return f"The choices of `ssd train`:\n\n| | |\n|---|---|\n{rows}"


def _metrics(measured: Measured | None) -> str:
    if measured is None:
        return "None were given."
    where = (
        f"On the {_text(measured.split)} split of {_text(measured.data or 'its dataset')} ({measured.how}):"
    )
    rows = [
        f"| {name} | {value:.3f} | {MEANINGS[name]} |"
        for name, value in measured.metrics.items()
        if value >= 0
    ]
    text = f"{where}\n\n| | | |\n|---|---|---|\n" + "\n".join(rows)
    if measured.per_class:
        rows = [
            f"| {_text(name)} | {row['AP']:.3f} |" if row["AP"] >= 0 else f"| {_text(name)} | - |"
            for name, row in list(measured.per_class.items())[:_MOST_CLASSES]
        ]
        text += "\n\n| class | AP |\n|---|---|\n" + "\n".join(rows)
    return text


def _limits(found: Checkpoint, measured: Measured | None) -> str:
    lines = [
        "It finds only the classes above, in images like those that it was trained on; of others nothing is "
        "known.",
        f"Images are resized to {found.layout.size} x {found.layout.size} pixels: objects that are small in "
        "them are missed; look at large images in tiles (`--tiles`).",
        _calibrated(found),
    ]
    if measured and measured.metrics.get("APs", -1) >= 0:
        small, all_sizes = measured.metrics["APs"], measured.metrics["AP"]
        lines.insert(
            2, f"For small objects (area below 32 x 32) AP is {small:.3f}, over all sizes {all_sizes:.3f}."
        )
    return "\n".join(f"- {line}" for line in lines)


def _calibrated(found: Checkpoint) -> str:
    if found.score_thresholds:
        return "Each class has a score threshold of its own: `--score-threshold calibrated`."
    return "Scores are not calibrated: choose the threshold on images of your own (`ssd calibrate`)."


def _front_matter(name: str, data: str, measured: Measured | None, license: str | None) -> str:
    try:
        from huggingface_hub import EvalResult, ModelCardData  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtra("hub") from error
    results: list[EvalResult] = []
    if measured:
        results = [
            EvalResult(
                task_type="object-detection",
                dataset_type=re.sub(r"[^\w.-]+", "-", measured.data) or "unknown",
                dataset_name=measured.data or "unknown",
                dataset_split=measured.split,
                metric_type=metric.lower(),
                metric_name=f"{metric} ({MEANINGS[metric]})",
                metric_value=round(value, 4),
            )
            for metric, value in measured.metrics.items()
            if value >= 0
        ]
    front = ModelCardData(
        license=license,
        library_name="ssd300",
        pipeline_tag="object-detection",
        tags=["object-detection", "ssd", "pytorch"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"{front.to_yaml()}\n"


def _text(text: str) -> str:
    """Text of anybody's within Markdown, as a line that is shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", as_line(text))
