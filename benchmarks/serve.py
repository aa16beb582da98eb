"""`ssd serve` under load on loopback, against `Detector` alone on the same images, in turn in one run.

python benchmarks/serve.py [WEIGHTS] [--clients 32] [--images 256] [--rounds 5] [--batch-size 8]

Made-up scenes as JPEG files in memory. Each client sends one image a request and waits for its answer, on a
connection that stays open; all clients share this process, and the machine with the server. Each answer is
compared with what `Detector` gave for its image: the classes of the objects, best first, of 0.5 and more.
"""

import argparse
import http.client
import io
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
from timing import heading

from ssd.detector import Detector
from ssd.shapes import draw_scene


def made_images(count: int) -> list[bytes]:
    """So many of 32 scenes, again and again."""
    scenes = []
    for seed in range(32):
        content = io.BytesIO()
        draw_scene(np.random.default_rng(seed))[0].save(content, "JPEG", quality=90)
        scenes.append(content.getvalue())
    return [scenes[i % 32] for i in range(count)]


def surely(detections: list[dict]) -> list[str]:
    return sorted(each["name"] for each in detections if each["score"] > 0.5)


def load(port: int, images: list[bytes], clients: int) -> tuple[float, list[float], list[list[dict]]]:
    """Seconds for all images, those of each request, and the detections of each image."""
    numbers = itertools.count()
    times, answers = [0.0] * len(images), [[]] * len(images)

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (number := next(numbers)) < len(images):
            start = time.perf_counter()
            connection.request("POST", "/detect", images[number])
            response = connection.getresponse()
            body = response.read()
            times[number] = time.perf_counter() - start
            assert response.status == 200, body
            answers[number] = json.loads(body)["results"][0]["detections"]
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, times, answers


def _images_a_batch(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        values = dict(line.split() for line in answer.read().decode().splitlines() if line[0] != "#")
    return int(values["ssd_images_total"]) / int(values["ssd_batches_total"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights", nargs="?", default="shapes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    images = made_images(options.images)
    detector = Detector.load(options.weights)
    command = [sys.executable, "-m", "ssd", "serve", options.weights, "--port", "0"]
    server = subprocess.Popen(
        [*command, "--batch-size", str(options.batch_size)], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(server.stdout.readline().rstrip("/\n").rpartition(":")[2])
        print(heading())
        print(f"{detector}, batches of {options.batch_size}, {options.clients} clients")
        load(port, images[:32], options.clients)
        ratios, latencies, rates, changed = [], [], [], 0
        for _ in range(options.rounds):
            start = time.perf_counter()
            found = list(detector.stream(images, batch_size=options.batch_size))
            alone = time.perf_counter() - start
            seconds, times, answers = load(port, images, options.clients)
            for one, other in zip(found, answers, strict=True):
                changed += surely(one.to_dict()["detections"]) != surely(other)
            ratios.append(alone / seconds)
            rates.append((len(images) / alone, len(images) / seconds))
            latencies += times
            print(
                f"  Detector {rates[-1][0]:6.1f} images/s, server {rates[-1][1]:6.1f}, ratio {ratios[-1]:.3f}"
            )
        median = [statistics.median(each) for each in zip(*rates, strict=True)]
        print(f"Detector {median[0]:.1f} images/s, server {median[1]:.1f} (medians)")
        print(f"server / Detector: {statistics.median(ratios):.3f} (median of {options.rounds})")
        p50, p99 = (1e3 * float(np.percentile(latencies, p)) for p in (50, 99))
        print(f"{len(latencies)} requests, all answered; p50 {p50:.0f} ms, p99 {p99:.0f} ms")
        print(f"{_images_a_batch(port):.1f} images a batch")
        print(f"{changed} of them with other objects than the Detector's")
    finally:
        server.terminate()
        print(f"exit status of the server after SIGTERM: {server.wait()}")


if __name__ == "__main__":
    main()
