"""Detect on a collection of images with Ray Data: from images to Parquet, on one machine or a cluster.

    pip install ssd300 'ray[data]'
    python examples/ray_batch.py photos/ results/ --weights coco --actors 8

Each actor holds a detector and writes one Parquet file a batch, whole or not at all, named by its images.
Of a worker that dies Ray gives the batches to another, and the same command goes on where one ended.
Images that cannot be read have a row with the error, and are tried again by the next run. Batches are those
of a single process, whatever the number of actors, and so are the results.
"""

import argparse
import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ssd.sources import find_images

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32()))),  # left, top, right, bottom in pixels
        ("scores", pa.list_(pa.float32())),
        ("names", pa.list_(pa.string())),
        ("error", pa.string()),  # null where the image was read
    ]
)


class Detect:
    """An actor: it has a detector, and writes what it finds in the batches that it is given."""

    def __init__(self, weights: str, output: str, threshold: float) -> None:
        import ssd  # noqa: PLC0415 (in the worker)

        self.detector = ssd.Detector.load(weights, progress=False)
        self.output, self.threshold = Path(output), threshold

    def __call__(self, row: dict) -> dict:
        sources = list(row["sources"])
        rows = {}
        found = self.detector.stream(
            sources,
            batch_size=len(sources),
            score_threshold=self.threshold,
            on_error=lambda name, error: rows.update({name: {"source": name, "error": str(error)}}),
        )
        for each in found:
            rows[each.source] = {
                "source": each.source,
                "width": each.image_size[1],
                "height": each.image_size[0],
                "boxes": each.boxes.tolist(),
                "scores": each.scores.tolist(),
                "names": each.names.tolist(),
            }
        table = pa.Table.from_pylist([rows[source] for source in sources], SCHEMA)
        name = hashlib.sha256("\0".join(sources).encode(errors="surrogatepass")).hexdigest()[:20]
        new = self.output / f".{name}.{os.getpid()}"
        pq.write_table(table, new)
        os.replace(new, self.output / f"{name}.parquet")
        objects = sum(len(rows[source].get("scores", ())) for source in sources)
        errors = sum("error" in rows[source] for source in sources)
        return {"images": len(sources), "objects": objects, "errors": errors}


def done(output: Path) -> set[str]:
    """The images whose results are written."""
    sources = set()
    for file in output.glob("*.parquet"):
        table = pq.read_table(file, columns=["source", "error"])
        rows = zip(table["source"].to_pylist(), table["error"].to_pylist(), strict=True)
        sources |= {source for source, error in rows if error is None}
    return sources


def detect(
    images: list[str],
    output: Path,
    *,
    weights: str,
    threshold: float = 0.4,
    batch_size: int = 8,
    actors: int = 1,
    gpus: float = 0,
) -> dict[str, int]:
    """Detect on images, of which those in batches that are whole in the output are left out; counts."""
    import ray  # noqa: PLC0415 (it takes seconds)

    output.mkdir(parents=True, exist_ok=True)
    written = done(output)
    batches = [images[at : at + batch_size] for at in range(0, len(images), batch_size)]
    batches = [{"sources": batch} for batch in batches if not written.issuperset(batch)]
    counts = {"images": 0, "objects": 0, "errors": 0}
    if not batches:
        return counts
    blocks = min(len(batches), max(2 * actors, len(batches) // 64))  # what is done again where a worker dies
    data = ray.data.from_items(batches, override_num_blocks=blocks)
    results = data.map(
        Detect,
        fn_constructor_args=(weights, str(output.absolute()), threshold),
        concurrency=actors,
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in results.iter_rows():
        counts = {name: counts[name] + int(row[name]) for name in counts}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Detect on a collection of images with Ray Data.")
    parser.add_argument("images", type=Path, help="a folder, with its subfolders")
    parser.add_argument("output", type=Path, help="a folder that all machines see")
    parser.add_argument("--weights", default="coco")
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    options = parser.parse_args()
    images = [str(each.image) for each in find_images(str(options.images / "**"))]
    counts = detect(
        images,
        options.output,
        weights=options.weights,
        threshold=options.threshold,
        batch_size=options.batch_size,
        actors=options.actors,
        gpus=options.gpus,
    )
    left = len(images) - counts["images"]
    told = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{told}; {left} images were done before")


if __name__ == "__main__":
    main()
