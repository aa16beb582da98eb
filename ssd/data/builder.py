"""What the readers of all formats share: names of splits, numbers, paths, and putting a record together."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ssd.data.annotations import Annotations, Problem
from ssd.data.judge import judge_boxes, judge_files, judge_repeats, lost_images, upright_sizes
from ssd.errors import AnnotationError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""The names under which folders keep each split."""


def split_names(split: str) -> tuple[str, ...]:
    """The names under which a folder may keep a split; that of any other split is its own."""
    return SPLITS.get(split, (split,))


class Builder:
    """Collects what a reader finds, and has every file and box judged by the same rules.

    Args:
        source: the annotation file, or the folder of them.
        root: the folder of the images.
        follow_links: see `Annotations.follow_links`.
    """

    def __init__(self, source: Path, root: Path, *, follow_links: bool = False) -> None:
        self.source, self.root, self._follow_links = source, root, follow_links
        self.names: list[str] = []
        self._ids: list[int | str] = []
        self._sizes: list[tuple[int, int]] = []
        self._boxes: list[tuple[float, ...]] = []
        self._rows: list[tuple[int, int, bool, float | None, str]] = []
        self._problems: list[Problem] = []

    def problem(self, kind: str, file: str, annotation: str, message: str, *, fatal: bool = True) -> None:
        """Note what is wrong; see `Problem`."""
        self._problems.append(Problem(kind, file, annotation, message, fatal))

    def set_classes(
        self, names: Sequence[str], category_ids: tuple[int, ...], wanted: Sequence[str] | None
    ) -> list[int]:
        """Settle the classes.

        Args:
            names: of the dataset's categories.
            category_ids: of the same.
            wanted: the classes of a model, in its order; None for the dataset's own.

        Returns:
            The label of each of the dataset's categories.

        Raises:
            AnnotationError: there are no categories, two have one name, or one is none of the classes.
        """
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or not names:
            what = f"two categories are called {twice[0]!r}" if twice else "there are no categories"
            raise AnnotationError(f"{self.source}: {what}")
        if wanted is None:
            self._class_names, self._category_ids = tuple(names), category_ids
        else:
            unknown = [name for name in names if name not in wanted]
            if unknown:
                raise AnnotationError(
                    f"{self.source}: the categories {', '.join(unknown[:5])} are none of the classes "
                    f"{', '.join(wanted[:10])}{' ...' if len(wanted) > 10 else ''}"
                )
            ids = dict(zip(names, category_ids, strict=True))
            free = iter(i for i in range(1, 2 * len(wanted) + len(ids) + 1) if i not in ids.values())
            self._class_names = tuple(wanted)
            self._category_ids = tuple(ids[name] if name in ids else next(free) for name in wanted)
        return [self._class_names.index(name) + 1 for name in names]

    def add_image(self, name: str, image_id: int | str, width: object, height: object) -> int:
        """Add an image, by its path within `root`; its index, which `add_box` takes."""
        size = finite_numbers([width, height], 2)
        self._sizes.append((int(size[0]), int(size[1])) if size and min(size) >= 1 else (0, 0))
        self.names.append(name)
        self._ids.append(image_id)
        return len(self.names) - 1

    def add_box(
        self,
        image: int,
        tag: str,
        box: tuple[float, ...],
        label: int,
        *,
        crowd: bool = False,
        area: float | None = None,
    ) -> None:
        """Add a box.

        Args:
            image: the index of its image.
            tag: what messages call it.
            box: xyxy in pixels of the upright image.
            label: counted from 1.
            crowd, area: see `Annotations`.
        """
        self._boxes.append(box)
        self._rows.append((image, label, crowd, area, tag))

    def build(self, labels_hint: str = "") -> Annotations:
        """The record of all that was added, with what is wrong with it."""
        self._problems += judge_files(self.root, self.names, follow_links=self._follow_links)
        self._problems += judge_repeats(self.names)
        self._read_sizes()
        rows = self._rows
        image = np.array([row[0] for row in rows], np.int64)
        order = np.argsort(image, kind="stable")
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)[order]
        image = image[order]
        tags = [rows[i][4] for i in order]
        labels = np.array([rows[i][1] for i in order], np.int64)
        sizes = np.array(self._sizes, np.int64).reshape(-1, 2)
        usable, problems = judge_boxes(boxes, labels, image, tags, self.names, sizes)
        extent = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        given = np.array([np.nan if rows[i][3] is None else rows[i][3] for i in order], np.float64)
        counts = np.bincount(image, minlength=len(self.names))
        return Annotations(
            root=self.root,
            source=self.source,
            class_names=self._class_names,
            category_ids=self._category_ids,
            file_names=np.array(self.names, np.str_),
            image_ids=tuple(self._ids),
            sizes=sizes,
            starts=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
            boxes=boxes,
            labels=labels,
            crowd=np.array([rows[i][2] for i in order], np.bool_),
            areas=np.where(np.isnan(given), extent, given),
            usable=usable,
            problems=(*self._problems, *problems),
            follow_links=self._follow_links,
            labels_hint=labels_hint,
        )

    def _read_sizes(self) -> None:
        """Read sizes that the files do not give, without which nobody knows which boxes lie outside."""
        lost = lost_images(self._problems)
        unknown = [i for i, size in enumerate(self._sizes) if size == (0, 0) and self.names[i] not in lost]
        paths = [self.root / self.names[i] for i in unknown]
        for i, size in zip(unknown, upright_sizes(paths), strict=True):
            self._sizes[i] = size or (0, 0)


def finite_numbers(values: object, count: int) -> tuple[float, ...] | None:
    """The values as finite floats, or None if they are not `count` numbers."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    # Far beyond any image, and float32 squares it; JSON's integers have no limit at all.
    return tuple(map(float, values)) if all(abs(value) < 1e9 for value in values) else None


def number(text: str | None) -> float:
    """A number that is written as text; NaN if it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def stays_inside(name: str) -> bool:
    """Whether a relative path, as written, cannot leave its folder (on any system)."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return (
        bool(name)
        and "\0" not in name
        and not parts.is_absolute()
        and ".." not in parts.parts
        and (":" not in parts.parts[0] if parts.parts else False)
    )


def read_text(path: Path) -> str:
    """The text of a file; bytes that are no UTF-8 become question marks."""
    return path.read_text(encoding="utf-8", errors="replace")
