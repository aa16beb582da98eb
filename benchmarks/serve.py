"""`ssd serve` under load on loopback, against `Detector` alone on the same images, in turn in one run.

python benchmarks/serve.py [WEIGHTS] [--clients 32] [--images 256] [--rounds 5] [--batch-size 8]

Made-up scenes as JPEG files in memory. Each client sends one image a request and waits for its answer, on a
connection that stays open; all clients share this process, and the machine with the server. Each answer is
compared with what `Detector` gave for its image: the classes of the objects of 0.5 and more. What an image
takes of the processor is told of each, too: unlike the time, it differs little beside other work.
"""

import argparse
import contextlib
import io
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

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


def load(port: int, images: list[bytes], clients: int) -> tuple[float, list[float], list[bytes]]:
    """Seconds for all images, those of each request, and the answers.

    One loop sends and receives for all clients: what it takes of the processor, the server lacks.
    """
    head = "POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    requests = [head.format(len(each)).encode() + each for each in images]
    begun, times, answers = [0.0] * len(images), [0.0] * len(images), [b""] * len(images)
    numbers, selector, start = iter(range(len(images))), selectors.DefaultSelector(), time.perf_counter()

    def ask(connection: socket.socket) -> None:
        number = next(numbers, None)
        if number is None:
            selector.unregister(connection)
            connection.close()
        else:
            begun[number] = time.perf_counter()
            connection.sendall(requests[number])
            selector.modify(connection, selectors.EVENT_READ, number)

    for _ in range(clients):
        connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        selector.register(connection, selectors.EVENT_READ)
        ask(connection)
    while selector.get_map():
        for key, _ in selector.select():
            received = key.fileobj.recv(1 << 20)
            assert received, "the server closed a connection"
            answers[key.data] += received
            header, _, body = answers[key.data].partition(b"\r\n\r\n")
            length = re.search(rb"\ncontent-length: *(\d+)", header, re.IGNORECASE)
            if length and len(body) == int(length[1]):
                times[key.data] = time.perf_counter() - begun[key.data]
                ask(key.fileobj)
    return time.perf_counter() - start, times, answers


def detections_of(answer: bytes) -> list[dict]:
    header, _, body = answer.partition(b"\r\n\r\n")
    assert header.startswith(b"HTTP/1.1 200 "), answer
    return json.loads(body)["results"][0]["detections"]


def processor_seconds(pid: int) -> float:
    """Of another process, all of its threads, as Linux counts them; 0 elsewhere."""
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


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
        rounds, latencies, changed = [], [], 0
        for _ in range(options.rounds):
            mine, start = time.process_time(), time.perf_counter()
            found = list(detector.stream(images, batch_size=options.batch_size))
            alone, alone_cpu = time.perf_counter() - start, time.process_time() - mine
            mine, servers = time.process_time(), processor_seconds(server.pid)
            seconds, times, answers = load(port, images, options.clients)
            clients_cpu, server_cpu = time.process_time() - mine, processor_seconds(server.pid) - servers
            for one, other in zip(found, map(detections_of, answers), strict=True):
                changed += surely(one.to_dict()["detections"]) != surely(other)
            latencies += times
            spent = [1e3 * each / len(images) for each in (alone_cpu, server_cpu, clients_cpu)]
            rounds.append((len(images) / alone, len(images) / seconds, alone / seconds, *spent))
            print("  Detector {:6.1f} images/s, server {:6.1f}, ratio {:.3f}".format(*rounds[-1][:3]))
        median = [statistics.median(each) for each in zip(*rounds, strict=True)]
        print("Detector {:.1f} images/s, server {:.1f} (medians)".format(*median[:2]))
        print(f"server / Detector: {median[2]:.3f} (median of {options.rounds})")
        print("processor ms an image: Detector {:.1f}, server {:.1f}, clients {:.2f}".format(*median[3:]))
        p50, p99 = (1e3 * float(np.percentile(latencies, p)) for p in (50, 99))
        print(f"{len(latencies)} requests, all answered; p50 {p50:.0f} ms, p99 {p99:.0f} ms")
        print(f"{_images_a_batch(port):.1f} images a batch")
        print(f"{changed} of them with other objects than the Detector's")
    finally:
        server.terminate()
        print(f"exit status of the server after SIGTERM: {server.wait()}")


if __name__ == "__main__":
    main()
