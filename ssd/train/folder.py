"""The run folder: what a run is, its metrics, weights, pictures, and the state that it goes on from."""

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ssd import checkpoint
from ssd.backends import Options
from ssd.data import Annotations, item_name
from ssd.data.dataset import as_targets
from ssd.detector import Detector
from ssd.drawing import draw_detections, encoded, side_by_side
from ssd.errors import MissingExtra
from ssd.files import clear_leftovers, write_file
from ssd.plots import draw_curves
from ssd.train.state import Run, is_finite, save_state


class RunFolder:
    """Writes the run folder, in the main process; in the others nothing is written.

    Args:
        path: of the folder; made by `write_config` if it is not there.
        class_names: one for each class but the background.
        category_ids: the dataset's own id of each class, or none.
        is_main: whether this is the process that writes.
    """

    def __init__(
        self, path: Path, class_names: tuple[str, ...], category_ids: list[int], *, is_main: bool
    ) -> None:
        self._path, self._names, self._category_ids = path, class_names, category_ids
        self._is_main = is_main

    def write_config(self, config: Mapping[str, Any], source: Mapping[str, Any] | None) -> None:
        """Write down what the run is.

        Args:
            config: all choices, by name.
            source: where the data came from; None for what the folder says already.
        """
        if not self._is_main:
            return
        self._path.mkdir(parents=True, exist_ok=True)
        for folder in (self._path, self._path / "samples"):  # a run that goes on may have been killed
            clear_leftovers(folder)
        file = self._path / "config.json"
        if source is None and file.exists():  # a run goes on that may have been started by the command
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                source = json.loads(file.read_bytes())["data"]
        notes = {
            "config": config,
            "class_names": self._names,
            "category_ids": self._category_ids,
            "data": source,
        }
        write_file(file, json.dumps(notes, indent=2).encode())

    def write_state(self, run: Run) -> bool:
        """Write what resuming starts from; False if it holds NaN, and is better not kept."""
        if self._is_main and is_finite(run.model):
            save_state(self._path / "state.pt", run)
            return True
        return not self._is_main

    def write_epoch(self, run: Run, row: Mapping[str, float], score_thresholds: Sequence[float]) -> None:
        """Metrics, weights, and last the state: what resuming starts from is never ahead of the rest.

        Args:
            run: at the end of an epoch; it learns the highest AP.
            row: of the epoch, the last one of the run's history.
            score_thresholds: of each class, for the weights as they are; or none.
        """
        best = row.get("AP", -1.0) > run.progress.best
        run.progress.best = max(run.progress.best, row.get("AP", -1.0))
        if not self._is_main:
            return
        columns = list(dict.fromkeys(key for each in run.progress.history for key in each))
        table = io.StringIO()
        rows = csv.DictWriter(table, columns, lineterminator="\n")
        rows.writeheader()
        rows.writerows({key: f"{value:.6g}" for key, value in each.items()} for each in run.progress.history)
        write_file(self._path / "metrics.csv", table.getvalue().encode())
        for name in ("last", "best") if best else ("last",):
            checkpoint.save(
                self._path / f"{name}.safetensors",
                run.evaluated().state_dict(),
                self._names,
                category_ids=self._category_ids,
                config=run.config,
                layout=run.model.layout,
                score_thresholds=score_thresholds,
            )
        self.write_state(run)

    def write_curves(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Draw the rows of all epochs; False where there is no matplotlib."""
        if self._is_main:
            try:
                write_file(self._path / "curves.png", draw_curves(history))
            except MissingExtra:
                return False
        return True

    def write_samples(
        self, detector: Detector, val: Annotations | Dataset[Any], epoch: int, tiles: int | None = None
    ) -> None:
        """Draw four validation images, each with its truth and beside that with what is detected."""
        if not self._is_main:
            return
        count = len(val)  # type: ignore[arg-type]
        # Drawn one by one, as the sheet takes them: photos are large.
        rows = (self._sample(detector, val, i, tiles) for i in sorted({count * k // 4 for k in range(4)}))
        headings = ("truth", f"detected after epoch {epoch}, score {Options.score_threshold} or more")
        sheet = encoded(side_by_side(rows, headings))
        (self._path / "samples").mkdir(exist_ok=True)
        write_file(self._path / "samples" / f"epoch-{epoch:03}.jpg", sheet)

    def _sample(
        self, detector: Detector, val: Annotations | Dataset[Any], i: int, tiles: int | None
    ) -> tuple[Image.Image, Image.Image]:
        """An image with its truth, and with what is detected."""
        if isinstance(val, Annotations):
            part = val.of_image(i)
            source, boxes, labels = val.path(i), val.boxes[part].astype(np.float32), val.labels[part]
        else:
            source, target = val[i]
            boxes, labels = as_targets(target, item_name(val, i))
        found = detector(source, tiles=tiles)
        picture = found.image
        assert picture is not None
        corners = np.hstack([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])])
        names = [" ".join(self._names[label - 1].split()) for label in labels]
        return draw_detections(picture, corners, names, labels - 1), found.draw()
