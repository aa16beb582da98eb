"""Objects that keep their number over the frames of a film, and what they cross: ByteTrack of `trackers`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ssd.detections import Detections, LineCount, ZoneCount
from ssd.errors import ImageError, MissingExtra, UserError

try:
    import supervision
    import trackers
    from trackers.utils.converters import xywh_to_xyxy, xyxy_to_xywh
    from trackers.utils.state_representations import BaseStateEstimator
except ModuleNotFoundError as error:
    raise MissingExtra("track") from error
except ImportError as error:
    # Such as that OpenCV, which trackers needs, does not find libGL, as in small containers.
    raise UserError(
        f"what tracks objects is installed but cannot be loaded ({error}); where a library of the system is "
        "missing, install that: on Debian and Ubuntu, apt-get install libgl1 libglib2.0-0"
    ) from error

FloatArray = npt.NDArray[np.float64]

LOW = 0.1
"""Least score of what may go on with an object that is known already; ByteTrack's (arXiv 2110.06864)."""

_LOW_OVERLAP = 0.3  # IoU that such a one has with an object; others are often of none

LONGEST_GAP = 4.0
"""Seconds that an object may be hidden and keep its id: 2, and the time that it takes to go behind something
and come out again, when what is seen of it is not found either."""

# Chosen with benchmarks/tracking.py. Standard deviations, in parts of an object's size: the root of its area.
_BOX_NOISE = 0.06  # of the sides of a detected box
_ACCELERATION = 0.002  # of an object, a thirtieth of a second squared
_GROWTH = 0.01  # of its width and height, in a thirtieth of a second
_SPEED = 0.05  # in a thirtieth of a second, of what is seen for the first time

_CUT = 0.1  # a box that is by so much narrower or lower than its object is taken for a part of it
_SHRINKING = 0.03  # of that, what is believed to be the object's own, in each frame

_BUFFER = 0.3  # by which boxes grow on each side before their overlap is taken, of C-BIoU (arXiv 2211.14317)


class _Motion(BaseStateEstimator):
    """A Kalman filter of centre, width, height and the centre's speed.

    The library's own take the box of an object that is half hidden for one that slows down and shrinks, and
    look for it elsewhere when it comes out again. Here such a box is completed on the side that is where it
    was expected.
    """

    _POS_IDX, _VEL_IDX = np.array([0, 1]), np.array([4, 5])

    def _create_filter(self, bbox: FloatArray) -> Any:
        sides = np.maximum(bbox[2:] - bbox[:2], 1)
        self._size = float(np.sqrt(sides.prod()))
        return self._init_cv_filter(6, xyxy_to_xywh(bbox))

    def set_kf_covariances(self, *_: Any, **__: Any) -> None:
        """Set noise by the object's size, in place of the tracker's, which is the same for all."""
        noise = np.eye(6) * np.repeat([_ACCELERATION / 2, _GROWTH, _ACCELERATION], 2) ** 2
        for position, speed in zip(self._POS_IDX, self._VEL_IDX, strict=True):  # of a random acceleration
            noise[position, speed] = noise[speed, position] = _ACCELERATION**2 / 2
        first = np.diag(np.repeat([_BOX_NOISE, _BOX_NOISE, _SPEED], 2) ** 2)
        boxes = np.eye(4) * _BOX_NOISE**2
        super().set_kf_covariances(*(each * self._size**2 for each in (boxes, noise, first)))

    def bbox_to_measurement(self, bbox: FloatArray) -> FloatArray:
        return np.asarray(xyxy_to_xywh(bbox))

    def state_to_bbox(self) -> FloatArray:
        state = self.kf.state[:4].reshape(4)
        return np.asarray(xywh_to_xyxy(np.concatenate([state[:2], np.maximum(state[2:], 1)])))

    def clamp_velocity(self, frame_step: float = 1.0) -> None:
        pass

    def update(self, bbox: FloatArray | None) -> None:
        super().update(bbox if bbox is None else completed(bbox, self.state_to_bbox()))


def completed(box: FloatArray, expected: FloatArray) -> FloatArray:
    """A box of what may be a part of an object, as that of all of it.

    Args:
        box, expected: xyxy, ``[4]``.

    >>> completed(np.array([100.0, 0, 130, 50]), np.array([101.0, 0, 151, 50])).round(1).tolist()
    [100.0, 0.0, 149.4, 50.0]
    """
    box = np.array(box, np.float64)
    for low, high in ((0, 2), (1, 3)):
        size = expected[high] - expected[low]
        missing = size - (box[high] - box[low])
        if missing > _CUT * size:
            size -= _SHRINKING * missing
            if abs(box[low] - expected[low]) < abs(box[high] - expected[high]):
                box[high] = box[low] + size
            else:
                box[low] = box[high] - size
    return box


class Tracker:
    """Gives the objects of one film their ids.

    Objects of different classes never share an id, nor does one object change its class.

    Args:
        least: float ``[C]``, for each class the score from which on detections are given, and may be new
            objects; those below are given where they go on with one that has an id.
        first_id: of the first object.
    """

    def __init__(self, least: npt.NDArray[Any], first_id: int = 1) -> None:
        self._least, self._time = least, -np.inf
        self.next_id = first_id
        """The first id that no object has."""
        self._first_id = first_id
        # With the times of frames, these are of a thirtieth of a second, whatever the rate of the film.
        self._tracker = trackers.ByteTrackTracker(
            lost_track_buffer=round(30 * LONGEST_GAP),
            frame_rate=30,
            track_activation_threshold=0.5,
            high_conf_det_threshold=0.5,
            state_estimator_class=_Motion,
            iou=trackers.BIoU(_BUFFER),
        )

    def __call__(self, found: Detections) -> Detections:
        """The detections of the next frame with `track_ids`."""
        assert found.time is not None
        self._time = max(found.time, self._time + 1e-3)  # of a film that is wrong about it
        is_sure = found.scores >= self._least[found.class_ids]
        # Boxes of each class in a place of their own, for nothing else keeps the tracker from mixing them.
        shift = found.class_ids * 16.0 * max(found.image_size)
        boxes = found.boxes + np.outer(shift, [1.0, 0.0, 1.0, 0.0])
        known = np.reshape([each.get_state_bbox() for each in self._tracker.tracks], (-1, 4))
        fits = supervision.box_iou_batch(known, boxes).max(0, initial=0) >= _LOW_OVERLAP
        index = np.flatnonzero(is_sure | fits)
        tracked = self._tracker.update(
            supervision.Detections(
                xyxy=boxes[index],
                confidence=is_sure[index].astype(np.float32),
                class_id=found.class_ids[index].astype(int),
                data={"index": index},
            ),
            timestamp=self._time,
        )
        ids = np.full(len(found), -1)
        if len(tracked):  # in an order of its own
            ids[tracked.data["index"]] = tracked.tracker_id
        ids[ids >= 0] += self._first_id
        self.next_id = max(self.next_id, int(ids.max(initial=0)) + 1)
        return found.changed(track_ids=ids)[np.flatnonzero(is_sure | (ids >= 0)).tolist()]


class Counter:
    """Counts what crosses lines and is in zones, by supervision's `LineZone` and `PolygonZone`.

    Args:
        lines: x and y of start and end of each, in pixels of the film.
        zones: x and y of the corners of each.
    """

    def __init__(self, lines: Sequence[tuple[float, ...]], zones: Sequence[tuple[float, ...]]) -> None:
        self._lines, self._zones = lines, zones
        point = supervision.Point
        self._at_lines = [supervision.LineZone(point(a, b), point(c, d)) for a, b, c, d in lines]
        self._at_zones = [
            supervision.PolygonZone(np.reshape(each, (-1, 2)).round().astype(int)) for each in zones
        ]
        self._seen: list[set[int]] = [set() for _ in zones]
        self._last: dict[int, tuple[float, Any]] = {}  # of each object, when and where it was

    def __call__(self, found: Detections) -> Detections:
        """The detections of the next frame, which have `track_ids`, with `counts`.

        Raises:
            ImageError: a line or a zone reaches outside of the film.
        """
        assert found.time is not None
        assert found.track_ids is not None
        height, width = found.image_size
        for each in (*self._lines, *self._zones):
            x, y = np.reshape(each, (-1, 2)).T
            if min(x.min(), y.min()) < 0 or x.max() > width or y.max() > height:
                text = ",".join(f"{value:g}" for value in each)
                raise ImageError(
                    f"{found.source}: has {width} x {height} pixels, and {text} reaches outside of it; give "
                    "x and y of its points in pixels of the film"
                )
        here = supervision.Detections(
            xyxy=found.boxes.astype(np.float64), tracker_id=found.track_ids.astype(int)
        )
        for zone, seen in zip(self._at_zones, self._seen, strict=True):
            seen.update(set(found.track_ids[zone.trigger(here)].tolist()) - {-1})
        for number, box in zip(found.track_ids.tolist(), found.boxes, strict=True):
            self._last[number] = found.time, box
        self._last.pop(-1, None)
        self._last = {
            number: last for number, last in self._last.items() if found.time - last[0] <= LONGEST_GAP
        }
        # What is hidden is where it was: LineZone itself would forget on which side that is.
        known = supervision.Detections(
            xyxy=np.reshape([box for _, box in self._last.values()], (-1, 4)).astype(np.float64),
            tracker_id=np.array(list(self._last), int),
        )
        for line in self._at_lines:
            line.trigger(known)
        counts: list[LineCount | ZoneCount] = [
            LineCount(each, line.in_count, line.out_count)
            for each, line in zip(self._lines, self._at_lines, strict=True)
        ]
        counts += [
            ZoneCount(each, int(zone.current_count), len(seen))
            for each, zone, seen in zip(self._zones, self._at_zones, self._seen, strict=True)
        ]
        return found.changed(counts=tuple(counts))


def checked_points(points: Any, *, closed: bool) -> tuple[float, ...]:
    """x and y of a line's two points or a zone's corners, one after the other.

    Args:
        points: numbers, or pairs of them.
        closed: whether it is a zone.

    Raises:
        ValueError: they make no line, or no zone.

    >>> checked_points([(0, 200), (640, 200)], closed=False)
    (0.0, 200.0, 640.0, 200.0)
    """
    array = np.array(points, np.float64).ravel()
    text = ",".join(f"{value:g}" for value in array)
    corners = array.reshape(-1, 2) if len(array) % 2 == 0 else np.empty((0, 2))
    if not np.isfinite(array).all() or (len(corners) < 3 if closed else len(corners) != 2):
        wanted = "three or more points: x1,y1,x2,y2,x3,y3" if closed else "two points: x1,y1,x2,y2"
        raise ValueError(f"a {'zone' if closed else 'line'} is {wanted}; got {text or 'nothing'}")
    x, y = (corners - corners[0]).T
    following = np.roll(corners - corners[0], -1, 0)
    if closed and not abs((x * following[:, 1] - y * following[:, 0]).sum()) >= 2:  # twice its area
        raise ValueError(f"a zone has an area; {text} has none")
    if not closed and not (x.any() or y.any()):
        raise ValueError(f"a line has two points; {text} is one")
    return tuple(array.tolist())


def tracked(
    results: Iterator[Detections],
    least: npt.NDArray[Any],
    lines: Sequence[tuple[float, ...]] = (),
    zones: Sequence[tuple[float, ...]] = (),
) -> Iterator[Detections]:
    """Results of films, one after the other, with ids that no two objects of them share, and counts.

    Args:
        results: in the order of frames.
        least: see `Tracker`.
        lines, zones: see `Counter`; each film is counted by itself.

    Raises:
        ImageError: there is an image among them.
    """
    number, next_id = None, 1
    tracker = counter = None
    for found in results:
        if found.frame is None:
            raise ImageError(
                f"{found.source or 'a source'}: is an image, and tracking follows objects over the frames of "
                "films (and of animations, where all their frames are taken); detect without tracking"
            )
        if tracker is None or counter is None or found.number != number:
            number, next_id = found.number, next_id if tracker is None else tracker.next_id
            tracker, counter = Tracker(least, next_id), Counter(lines, zones)
        numbered = tracker(found)
        yield counter(numbered) if lines or zones else numbered
