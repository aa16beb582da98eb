"""The record of what the annotation files of one split say, whatever their format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssd.data.names import path_of
from ssd.errors import AnnotationError, as_line


@dataclass(frozen=True)
class Problem:
    """Something in a dataset that is wrong, or that one may want to know."""

    kind: str
    """A short name, the same for all of its kind, such as "zero area"; see `ssd.data.judge`."""
    file: str
    """The image, or the annotation file."""
    annotation: str
    """The annotation's id, or where it stands in the file; empty where the problem is the file's."""
    message: str
    fatal: bool = True
    """Whether training refuses it."""

    def __str__(self) -> str:
        where = f"{self.file}, annotation {self.annotation}" if self.annotation else self.file
        return as_line(f"{where}: {self.message}")


@dataclass(frozen=True)
class Annotations:
    """What the files of one split say, in flat arrays; image i has the boxes from ``starts[i]`` on."""

    root: Path
    """The folder of the images."""
    source: Path
    """The annotation file, or the folder of them."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """The file's own id of each class, or numbers from 1 where those are no integers."""
    file_names: npt.NDArray[np.str_]
    """``[N]``, relative to `root`."""
    image_ids: tuple[int | str, ...]
    sizes: npt.NDArray[np.int64]
    """Width and height ``[N, 2]``; 0 where the file does not say."""
    starts: npt.NDArray[np.int64]
    """``[N + 1]``."""
    boxes: npt.NDArray[np.float64]
    """xyxy in pixels of the upright image, as the file says, not clipped, ``[T, 4]``."""
    labels: npt.NDArray[np.int64]
    """``[T]``, counted from 1; 0 is left to the background."""
    crowd: npt.NDArray[np.bool_]
    """``[T]``: COCO's iscrowd, VOC's difficult. Not trained on, and ignored by evaluation."""
    areas: npt.NDArray[np.float64]
    """``[T]``: COCO's area, by which sizes are told apart; the box's where the file has none."""
    usable: npt.NDArray[np.bool_]
    """``[T]``: whether a box can be trained on; `problems` says why not."""
    problems: tuple[Problem, ...] = field(repr=False)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Where bad ones are allowed: how many images and boxes are not used, by what is wrong with them."""
    notes: tuple[str, ...] = ()
    """What one may want to know of the split, a line each."""
    areas_given: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_), repr=False)
    """``[T]``: whether an area is what the file says, and not the box's; empty where nobody asked."""
    labels_hint: str = field(default="", repr=False)
    """Where the boxes were looked for, for the message that there are none; empty where `source` tells it."""
    follow: bool = False
    """Whether names may lead out of `root`; see `ssd.data.load`."""

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, i: int) -> Path:
        """The file of an image.

        Raises:
            AnnotationError: the name leads out of the image folder.
        """
        name = str(self.file_names[i])
        path = path_of(self.root, name, follow=self.follow)
        if path is None:
            raise AnnotationError(f"{self.source}: {as_line(name)} leads out of {self.root}")
        return path

    def without(self, names: set[str]) -> "Annotations":
        """The same without some images and their boxes."""
        return self.select([i for i, name in enumerate(self.file_names.tolist()) if name not in names])

    def select(self, images: Sequence[int]) -> "Annotations":
        """Some of the images, by their indices and in that order, with their boxes."""
        kept = np.arange(len(self))[np.asarray(images, np.int64).reshape(-1)]  # from the end, where negative
        counts = np.diff(self.starts)[kept]
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        boxes = np.repeat(self.starts[kept] - starts[:-1], counts) + np.arange(starts[-1])
        gone = set(self.file_names.tolist()) - set(self.file_names[kept].tolist())
        return replace(
            self,
            file_names=self.file_names[kept],
            image_ids=tuple(self.image_ids[i] for i in kept),
            sizes=self.sizes[kept],
            starts=starts,
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            crowd=self.crowd[boxes],
            areas=self.areas[boxes],
            areas_given=self.areas_given[boxes] if len(self.areas_given) else self.areas_given,
            usable=self.usable[boxes],
            problems=tuple(problem for problem in self.problems if problem.file not in gone),
        )

    def images_of_boxes(self) -> npt.NDArray[np.int64]:
        """The index of each box's image, ``[T]``."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def trained_on(self, *, crowd: bool) -> npt.NDArray[np.bool_]:
        """Which boxes are trained on, ``[T]``; `crowd`: whether crowd boxes are, too."""
        return self.usable & (~self.crowd | crowd)

    def normalised_boxes(
        self, *, crowd: bool = False
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """What training matches: boxes, and width and height of their images in pixels.

        Boxes that cannot be used, and those of images whose size is not known, are not among them.

        Args:
            crowd: whether crowd boxes are.

        Returns:
            xyxy in parts of the image, clipped to [0, 1], ``[M, 4]``; and ``[M, 2]``.
        """
        sides = self.sizes[self.images_of_boxes()]
        known = self.trained_on(crowd=crowd) & (sides > 0).all(1)
        sides = sides[known]
        boxes = (self.boxes[known] / np.tile(sides, 2)).clip(0, 1).astype(np.float32)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return boxes[seen], sides[seen].astype(np.float32)

    def of_image(self, i: int) -> slice:
        """Where the boxes of an image are."""
        i = range(len(self))[i]  # negative ones count from the end
        return slice(int(self.starts[i]), int(self.starts[i + 1]))
