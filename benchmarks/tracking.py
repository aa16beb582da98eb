"""Trackers on the same detections: ids kept through occlusion, MOTA and IDF1.

pip install '.[track]' && python benchmarks/tracking.py

The scenes are made up, so that the truth of each frame is known: single objects that are hidden for two
seconds, and six that bounce about behind a wall. Their detections are made up, too, as a detector's are, or,
with --frames, those of the weights "shapes" in the drawn frames. The metrics are those of `trackers`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import supervision
import trackers
from trackers.eval import evaluate_mot_sequence

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import moving

from ssd.detections import Detections
from ssd.detector import Detector
from ssd.tracking import LONGEST_GAP, LOW, tracked

LEAST = 0.4
Ids = list[tuple[Detections, list[int]]]


def ours(results: Iterable[Detections], rate: float) -> Ids:
    each = tracked(iter(results), np.full(len(moving.CLASSES), LEAST))
    return [(found, found.track_ids.tolist()) for found in each]


def of_library(make: Callable[[float], object], *, timed: bool = True) -> Callable[..., Ids]:
    """A tracker as its library has it, with the same thresholds and the same longest gap."""

    def run(results: Iterable[Detections], rate: float) -> Ids:
        tracker, given = make(rate), []
        for found in results:
            options = {"timestamp": found.time} if timed else {}
            update = tracker.update if timed else tracker.update_with_detections
            some = update(
                supervision.Detections(
                    xyxy=found.boxes.astype(float),
                    confidence=found.scores,
                    class_id=found.class_ids.astype(int),
                    data={"index": np.arange(len(found))},
                ),
                **options,
            )
            order = np.asarray(some.data.get("index", []), int)
            given.append(
                (found[order.tolist()], np.asarray(some.tracker_id, int).tolist() if len(some) else [])
            )
        return given

    return run


def made(kind: type, **options: float) -> Callable[[float], object]:
    buffer = round(30 * LONGEST_GAP)
    return lambda rate: kind(lost_track_buffer=buffer, frame_rate=rate, **options)


BOTH = {"track_activation_threshold": LEAST, "high_conf_det_threshold": LEAST}
TRACKERS: dict[str, Callable[..., Ids]] = {
    "ssd": ours,
    "ByteTrack, trackers": of_library(made(trackers.ByteTrackTracker, **BOTH)),
    "ByteTrack, trackers' defaults": of_library(lambda rate: trackers.ByteTrackTracker(frame_rate=rate)),
    "OC-SORT, trackers": of_library(made(trackers.OCSORTTracker, high_conf_det_threshold=LEAST)),
    "BoT-SORT, trackers": of_library(made(trackers.BoTSORTTracker, enable_cmc=False, **BOTH)),
    "SORT, trackers": of_library(made(trackers.SORTTracker, track_activation_threshold=LEAST)),
}
if hasattr(supervision, "ByteTrack"):  # up to 0.27
    TRACKERS["ByteTrack, supervision"] = of_library(
        lambda rate: supervision.ByteTrack(LEAST, round(30 * LONGEST_GAP), frame_rate=rate), timed=False
    )


def keeps_its_id(run: Callable[..., Ids], seed: int, rate: float, *, wall: bool) -> bool:
    times, each = moving.hidden(seed, rate, wall=wall)
    given = run(moving.detected(times, [each], seed), rate)
    return len({number for _, ids in given for number in ids} - {-1}) == 1


def with_low_scores(results: Iterable[Detections]) -> list[Detections]:
    return [found[found.scores >= LOW] for found in results]


def of_network(detector: Detector, times: np.ndarray, objects: list[moving.Moving]) -> list[Detections]:
    wall = (moving.WIDTH / 2 - 30, moving.WIDTH / 2 + 30)
    frames = [moving.drawn(objects, i, wall) for i in range(len(times))]
    found = detector(frames, score_threshold=LOW)
    return [
        replace(each, image=None, number=0, frame=i, time=float(time))
        for i, (each, time) in enumerate(zip(found, times, strict=True))
    ]


def score(given: Ids, objects: list[moving.Moving]) -> tuple[float, float, int]:
    """MOTA, IDF1 and changes of ids, of what is at least half seen; each is given where it has an id."""
    with tempfile.TemporaryDirectory() as folder:
        truth, tracks = Path(folder, "truth.txt"), Path(folder, "tracks.txt")
        rows = []
        for number, each in enumerate(objects):
            for i in np.flatnonzero(each.share >= 0.5):
                rows.append((i + 1, number + 1, *_xywh(each.seen[i]), 1, 1, 1))
        _write(truth, rows)
        rows = [
            (found.frame + 1, number + 1, *_xywh(box), 1, -1, -1, -1)
            for found, ids in given
            for box, number in zip(found.boxes, ids, strict=True)
            if number >= 0
        ]
        _write(tracks, rows)
        result = evaluate_mot_sequence(truth, tracks, ["CLEAR", "Identity"])
    return result.CLEAR.MOTA, result.Identity.IDF1, result.CLEAR.IDSW


def _xywh(box: np.ndarray) -> tuple[float, ...]:
    return (*box[:2].tolist(), *(box[2:] - box[:2]).tolist())


def _write(path: Path, rows: list[tuple[float, ...]]) -> None:
    path.write_text("".join(",".join(f"{value:g}" for value in row) + "\n" for row in sorted(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--rate", type=float, default=25)
    parser.add_argument(
        "--frames", action="store_true", help="detect in drawn frames, with the weights shapes"
    )
    options = parser.parse_args()
    print(f"{options.seeds} seeds, {options.rate:g} frames/s")
    print(f"{'':30} {'gone 2 s':>9} {'wall 2 s':>9} {'MOTA':>7} {'IDF1':>7} {'changes':>8}")
    detector = Detector.load("shapes") if options.frames else None
    crowds = []
    for seed in range(max(1, options.seeds // 10)):
        times, objects = moving.crowd(seed, options.rate)
        if detector:
            crowds.append((objects, of_network(detector, times, objects)))
        else:
            crowds.append((objects, with_low_scores(moving.detected(times, objects, seed))))
    for name, run in TRACKERS.items():
        kept = [
            np.mean([keeps_its_id(run, seed, options.rate, wall=wall) for seed in range(options.seeds)])
            for wall in (False, True)
        ]
        scores = np.array([score(run(results, options.rate), objects) for objects, results in crowds])
        mota, idf1 = scores[:, :2].mean(0)
        print(
            f"{name:30} {kept[0]:9.0%} {kept[1]:9.0%} {mota:7.3f} {idf1:7.3f} {scores[:, 2].sum():8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
