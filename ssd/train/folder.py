"""The run folder: what a run is, its metrics, weights, pictures, and the state that it goes on from."""

import contextlib
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ssd import checkpoint
from ssd.data import Annotations
from ssd.detector import Detector
from ssd.drawing import encoded
from ssd.errors import MissingExtra
from ssd.files import clear_leftovers, write_file
from ssd.train.state import Run, is_finite, save_state


class RunFolder:
    """Writes the run folder, in the main process; in the others nothing is written.

    Args:
        path: of the folder; made by `write_config` if it is not there.
        class_names: one for each class but the background.
        category_ids: the dataset's own id of each class, or none.
        is_main: whether this is the process that writes.
        tensorboard: also write for TensorBoard.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """

    def __init__(
        self,
        path: Path,
        class_names: tuple[str, ...],
        category_ids: list[int],
        *,
        is_main: bool,
        tensorboard: bool,
    ) -> None:
        self._path, self._names, self._category_ids = path, class_names, category_ids
        self._is_main = is_main
        self._board: Any = None
        if tensorboard and is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
            except ImportError as error:
                raise MissingExtra("tensorboard") from error
            self._board = SummaryWriter(str(path))

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

    def write_epoch(self, run: Run, row: Mapping[str, float]) -> None:
        """Metrics, weights, and last the state: what resuming starts from is never ahead of the rest.

        Args:
            run: at the end of an epoch; it learns the highest AP.
            row: of the epoch, the last one of the run's history.
        """
        best = row.get("AP", -1.0) > run.progress.best
        run.progress.best = max(run.progress.best, row.get("AP", -1.0))
        if not self._is_main:
            return
        if self._board:
            for key, value in row.items():
                self._board.add_scalar(key, value, int(row["epoch"]))
            self._board.flush()
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
            )
        self.write_state(run)

    def write_samples(self, detector: Detector, val: Annotations | Dataset[Any], epoch: int) -> None:
        """Draw the detections on four validation images, side by side."""
        if not self._is_main:
            return
        count = len(val)  # type: ignore[arg-type]
        indices = sorted({count * k // 4 for k in range(4)})
        sources = [val.path(i) if isinstance(val, Annotations) else val[i][0] for i in indices]
        pictures = [found.draw() for found in detector(sources)]
        width, height = 480, 360
        sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height), "white")
        for k, picture in enumerate(pictures):
            small = ImageOps.contain(picture, (width, height))
            left, top = (
                k % 2 * width + (width - small.width) // 2,
                k // 2 * height + (height - small.height) // 2,
            )
            sheet.paste(small, (left, top))
        (self._path / "samples").mkdir(exist_ok=True)
        write_file(self._path / "samples" / f"epoch-{epoch:03}.jpg", encoded(sheet))
