import copy
import gc
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from conftest import HAS_GPU, PHOTOS, SMALL_LAYOUT, made_model
from PIL import Image, ImageOps
from torchvision.ops import batched_nms

from ssd import checkpoint
from ssd import detector as detector_module
from ssd.backends import of_model
from ssd.boxes import PUBLISHED_LAYOUT, box_iou, decode
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.errors import ImageError, ImageMemoryError, NonFiniteError
from ssd.images import load_image
from ssd.pixels import DECODED, Room
from ssd.postprocess import postprocess
from ssd.shapes import draw_scene
from ssd.sources import Film, Named
from ssd.tiles import cut
from ssd.transforms import evaluation_transform, normalize, resize

LOW = {"score_threshold": 0.3}


@pytest.fixture(scope="module")
def photo(photos):
    return photos / "chelsea.jpg"


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "class_ids")
    )


def close(a, b):
    return a.class_ids.tolist() == b.class_ids.tolist() and all(
        np.allclose(getattr(a, name), getattr(b, name), atol=tolerance)
        for name, tolerance in (("boxes", 0.05), ("scores", 1e-4))
    )


def test_equals_transform_network_and_postprocess(detector, small_model, photo):
    image = Image.open(photo).convert("RGB")
    with torch.no_grad():
        outputs = small_model(evaluation_transform(image, 300)[None])
    expected = postprocess(
        *outputs, PUBLISHED_LAYOUT.default_boxes(), score_threshold=0.3, max_detections=100
    )
    boxes, scores, class_ids = expected.per_image()[0]
    found = detector(photo, **LOW)
    assert 3 < len(found) == len(scores) < 100
    size = np.array([image.width, image.height, image.width, image.height])
    np.testing.assert_allclose(found.boxes, np.clip(boxes.numpy() * size, 0, size), atol=0.05)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    assert found.class_ids.tolist() == class_ids.tolist()


def test_result(detector, photo):
    found = detector(str(photo), **LOW)
    assert isinstance(found, Detections)
    assert found.class_names == ("cat", "cup", "person")
    assert found.image_size == (300, 451)
    assert found.source == str(photo)
    assert found.image.size == (451, 300)
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [451, 300, 451, 300]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_every_kind_of_source_gives_the_same_detections(detector, photo):
    image = Image.open(photo).convert("RGB")
    expected = detector(photo, **LOW)
    for source in (
        image,
        np.asarray(image),
        torch.from_numpy(np.array(image)).permute(2, 0, 1),
        photo.read_bytes(),
    ):
        assert same(detector(source, **LOW), expected)


def test_boxes_follow_the_image_when_it_is_stretched(detector, photo):
    """The network sees the same picture, so boxes scale with the image."""
    image = Image.open(photo).convert("RGB").resize((300, 300))
    tall = image.resize((300, 600), Image.Resampling.NEAREST).resize((300, 600))
    a, b = detector(image, **LOW), detector(tall, **LOW)
    assert len(a) > 0
    assert b.image_size == (600, 300)
    best = b[b.class_ids == a.class_ids[0]].boxes / [1, 2, 1, 2]
    assert np.abs(best - a.boxes[0]).max(axis=1).min() < 15


def test_one_gives_one_and_a_list_a_list(detector, photos):
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    results = detector(paths, **LOW)
    assert [each.source for each in results] == [str(path) for path in paths]
    assert all(close(each, detector(path, **LOW)) for each, path in zip(results, paths, strict=True))
    assert len(detector(tuple(paths[:1]))) == 1
    assert detector([]) == []
    for size in (1, 2, 5):
        again = detector(paths, batch_size=size, **LOW)
        assert all(close(a, b) for a, b in zip(again, results, strict=True))


def test_nothing_found(detector, photo):
    found = detector(photo, score_threshold=1.0)
    assert found.boxes.shape == (0, 4)
    assert (found.scores.dtype, found.class_ids.dtype) == (np.float32, np.int64)


def test_options(detector, photo):
    found = detector(photo, **LOW)
    assert same(detector(photo, max_detections=3, **LOW), found[:3])
    some = detector(photo, classes=["person", 0], **LOW)
    assert set(some.names.tolist()) <= {"person", "cat"}
    assert len(detector(photo, classes=[], **LOW)) == 0
    assert same(detector(photo, classes=some.class_ids, **LOW), some)
    assert same(detector(photo, classes="cat", **LOW), detector(photo, classes=["cat"], **LOW))
    assert len(detector(photo, iou_threshold=0.1, **LOW)) < len(detector(photo, iou_threshold=0.9, **LOW))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold must be in"),
        ({"iou_threshold": -1}, "iou_threshold must be in"),
        ({"max_detections": 0}, "max_detections must be"),
        ({"max_detections": 10**12}, "max_detections must be from 1 to 26,196"),
        ({"classes": ["persom"]}, "did you mean person"),
        ({"classes": ["zebra"]}, "it knows cat, cup, person"),
        ({"classes": [3]}, "no class 3"),
        ({"classes": [True]}, "no class True"),
    ],
)
def test_wrong_options_are_named(detector, photo, options, message):
    with pytest.raises(ValueError, match=message):
        detector(photo, **options)
    with pytest.raises(ValueError, match=message):
        detector.stream([photo], **options)


def test_calibrated_is_the_threshold_of_each_class(tiny_model, photo, tmp_path):
    names = ("cat", "cup", "person")
    every = Detector(tiny_model, names)(photo, score_threshold=0.01, max_detections=500)
    limits = tuple(float(np.median(every.scores[every.class_ids == k])) for k in range(3))
    detector = Detector(tiny_model, names, (), limits)
    found = detector(photo, score_threshold="calibrated", max_detections=500)
    kept = every[[score > limits[class_id] for _, score, class_id, _ in every]]
    assert same(found, kept)
    assert len(set(limits)) == len(set(found.class_ids.tolist())) == 3
    assert same(next(detector.stream([photo], score_threshold="calibrated", max_detections=500)), kept)
    path = tmp_path / "w.safetensors"
    checkpoint.save(path, tiny_model.state_dict(), names, layout=SMALL_LAYOUT, score_thresholds=limits)
    loaded = Detector.load(path, "cpu", "fp32")
    assert loaded.score_thresholds == pickle.loads(pickle.dumps(loaded)).score_thresholds == limits
    assert same(loaded(photo, score_threshold="calibrated", max_detections=500), kept)


def test_calibrated_without_thresholds_and_other_words_are_told(detector, small_model, photo):
    told = "needs a threshold for each class, and these weights have none: ssd calibrate finds them"
    with pytest.raises(ValueError, match=told):
        detector(photo, score_threshold="calibrated")
    with pytest.raises(ValueError, match="""a number from 0 to 1, or "calibrated"; got 'best'"""):
        detector.stream([photo], score_threshold="best")
    for wrong in ([0.5], (0.2, 0.3, 5), [0.2, float("nan"), 0.3], ["x", "y", "z"]):
        with pytest.raises(
            ValueError, match="score_thresholds are a number from 0 to 1 for each of 3 classes"
        ):
            Detector(small_model, ("a", "b", "c"), score_thresholds=wrong)


def test_wrong_batch_size_is_named(detector):
    with pytest.raises(ValueError, match="batch_size"):
        detector.stream([], batch_size=0)


def test_a_film_is_no_image_and_what_takes_it_is_told(detector):
    with pytest.raises(TypeError, match=r"a\.mp4: is a film.*detector\.stream\(\.\.\.\) takes it"):
        detector(Named("a.mp4", Film("a.mp4")))


def test_stream_of_one_image_is_refused(detector):
    pixels = np.zeros((3, 60, 60), np.uint8)
    for image in (
        Image.fromarray(pixels.transpose(1, 2, 0)),
        pixels,
        torch.from_numpy(pixels),
        pixels.tobytes(),
    ):
        with pytest.raises(TypeError, match="for one, call the detector"):
            detector.stream(image)


def test_nameless_images_are_counted(detector):
    with pytest.raises(ImageError, match=r"^image 1: .*divide by 255"):
        detector([np.zeros((9, 9)), np.full((9, 9), 255.0)])


def test_results_and_errors_of_a_stream_can_be_paired(detector, photo, tmp_path):
    """Each frame has the name and the number that its error would have, and the other way round."""
    frame = np.asarray(load_image(photo))
    (tmp_path / "bad.jpg").write_bytes(b"x")
    frames = [frame, np.full((9, 9), 255.0), photo, str(tmp_path / "bad.jpg"), photo, frame]
    frames.append(Named("camera 2, frame 17", frame))
    errors = []
    found = list(detector.stream(frames, batch_size=2, on_error=lambda *each: errors.append(each)))
    assert [(each.source, each.number) for each in found] == [
        ("image 0", 0),
        (str(photo), 2),
        (str(photo), 4),
        ("image 5", 5),
        ("camera 2, frame 17", 6),
    ]
    assert [(name, error.source, error.number) for name, error in errors] == [
        ("image 1", "image 1", 1),
        (str(tmp_path / "bad.jpg"), str(tmp_path / "bad.jpg"), 3),
    ]
    with pytest.raises(ImageError) as caught:
        list(detector.stream(frames))
    assert (caught.value.source, caught.value.number) == ("image 1", 1)
    assert [(each.source, each.number) for each in detector([frame, photo])] == [
        ("image 0", 0),
        (str(photo), 1),
    ]
    assert (detector(frame).source, detector(frame).number) == ("", None)


def test_repr(detector):
    assert repr(detector) == "Detector(3 classes, fp32, cpu, torch)"


def test_bad_images_are_named(detector, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        detector(tmp_path / "bad.jpg")
    with pytest.raises(FileNotFoundError):
        detector([tmp_path / "gone.jpg"])


# --- Stream ---


def test_stream_of_a_folder_and_a_glob(detector, photos):
    from_folder = list(detector.stream(photos, batch_size=2, **LOW))
    assert [each.source for each in from_folder] == [str(photos / f"{name}.jpg") for name in PHOTOS]
    from_glob = list(detector.stream(f"{photos}/*.jpg", **LOW))
    assert all(close(a, b) for a, b in zip(from_folder, from_glob, strict=True))


def test_stream_is_lazy_and_reads_only_a_little_ahead(detector, photo):
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield photo

    results = detector.stream(endless(), batch_size=2)
    assert asked == []
    next(results)
    results.close()
    assert len(asked) <= 2 * 2 + 8  # two batches, and what is read ahead: twice that, or one for each reader


def test_stream_reads_off_the_main_thread_in_order_and_stops_its_threads(detector, photos, monkeypatch):
    threads, original = set(), detector_module.load_scaled

    def noted(*arguments, **options):
        threads.add(threading.current_thread().name)
        return original(*arguments, **options)

    monkeypatch.setattr(detector_module, "load_scaled", noted)
    paths = [photos / f"{PHOTOS[i % 3]}.jpg" for i in range(7)]
    assert [each.source for each in detector.stream(paths, batch_size=3)] == [str(path) for path in paths]
    assert threads
    assert all(name.startswith("ssd-read") for name in threads)
    assert not any(thread.name.startswith("ssd-read") for thread in threading.enumerate())


def test_stream_names_bad_images_and_goes_on(detector, photos, tmp_path):
    bad, gone = tmp_path / "bad.jpg", tmp_path / "gone.jpg"
    bad.write_bytes(b"")
    errors = []
    paths = [bad, photos / "coffee.jpg", gone, photos / "chelsea.jpg"]
    found = list(detector.stream(paths, on_error=lambda name, error: errors.append((name, type(error)))))
    assert [each.source for each in found] == [str(paths[1]), str(paths[3])]
    assert errors == [(str(bad), ImageError), (str(gone), FileNotFoundError)]
    with pytest.raises(ImageError):
        list(detector.stream(paths))


def fail(monkeypatch, function, fails, error):
    """Have a function of the detector's module raise an error for some images."""
    original = getattr(detector_module, function)

    def or_not(image, *arguments, **options):
        if fails(image):
            raise error
        return original(image, *arguments, **options)

    monkeypatch.setattr(detector_module, function, or_not)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_for_one_image_leaves_the_others(detector, photos, monkeypatch, error):
    fail(monkeypatch, "resize", lambda image: image.size == (600, 400), error)
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    errors = []
    found = list(detector.stream(paths, on_error=lambda *each: errors.append(each)))
    assert [each.source for each in found] == [str(paths[0]), str(paths[1])]
    ((name, told),) = errors
    assert (name, told.source, told.number) == (str(paths[2]), str(paths[2]), 2)
    assert isinstance(told, ImageMemoryError)
    assert str(told).startswith(f"{paths[2]}: there is not enough memory for its 600x400 pixels")
    for read in (lambda: list(detector.stream(paths)), lambda: detector(paths[2])):
        with pytest.raises(ImageMemoryError, match=r"coffee\.jpg: .* 600x400"):
            read()


def test_other_errors_of_the_runtime_are_not_the_image_s(detector, photos, monkeypatch):
    fail(monkeypatch, "resize", lambda image: True, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        list(detector.stream([photos / "coffee.jpg"], on_error=lambda *each: None))


class Stream:
    """As of a server: read once, and never sought in."""

    def __init__(self, path):
        with path.open("rb") as file:
            self.read = io.BytesIO(file.read()).read


@pytest.mark.parametrize("kind", [str, Stream, lambda path: path.read_bytes()])
def test_an_image_for_which_others_left_no_memory_is_read_by_itself(detector, photos, monkeypatch, kind):
    photo, free = photos / "coffee.jpg", []

    def first(image):
        free.append(DECODED._free)
        return len(free) == 1

    fail(monkeypatch, "resize", first, MemoryError())
    errors = []
    (found,) = detector.stream([kind(photo)], on_error=lambda *each: errors.append(each))
    assert errors == []
    assert free == [DECODED.pixels - 600 * 400, 0]
    assert same(found, replace(detector(photo), source=found.source, number=0))
    assert found.image.size == (600, 400)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of memory")
def test_a_folder_with_a_photo_that_unfolds_to_more_than_the_memory(photos, weights_file, tmp_path):
    for name in PHOTOS:
        shutil.copy(photos / f"{name}.jpg", tmp_path)
    Image.new("1", (13000, 13000)).save(tmp_path / "bomb.png")
    code = """
import resource, sys
from ssd.detector import Detector

detector = Detector.load(sys.argv[1], "cpu", "fp32")
folder = sys.argv[2]
assert len(list(detector.stream(folder + "/*.jpg"))) == 3
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
for found in detector.stream(folder, on_error=lambda name, error: print(error)):
    print(found.source)
"""
    start = [sys.executable, "-c", code, str(weights_file), str(tmp_path)]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = f"{tmp_path / 'bomb.png'}: there is not enough memory for its 13000x13000 pixels, "
    assert sorted(line.partition("which")[0] for line in done.stdout.splitlines()) == sorted(
        [told, *(f"{tmp_path / name}.jpg" for name in PHOTOS)]
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_python_ends_although_a_pipe_is_waited_for(weights_file, tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    code = """
import sys, threading
from ssd.detector import Detector

results = Detector.load(sys.argv[1], "cpu", "fp32").stream([sys.argv[2]])
threading.Thread(target=lambda: next(results), daemon=True).start()
while not any(thread.name == "ssd-read" for thread in threading.enumerate()):
    pass
"""
    start = [sys.executable, "-c", code, str(weights_file), str(tmp_path / "photo.jpg")]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_scaled_decoding(detector, photos, tmp_path):
    Image.open(photos / "coffee.jpg").resize((1800, 1200)).save(tmp_path / "large.jpg", quality=95)
    [found] = detector.stream(tmp_path, scaled_decoding=True, **LOW)
    [whole] = detector.stream(tmp_path, **LOW)
    assert found.image is None
    assert whole.image is not None
    assert found.image_size == whole.image_size == (1200, 1800)
    assert abs(found.scores[0] - whole.scores[0]) < 0.05
    best = whole.boxes[whole.class_ids == found.class_ids[0]]
    assert np.abs(best - found.boxes[0]).max(1).min() < 60


# --- Robustness ---


def test_nan_outputs_are_an_error_that_names_the_image(photo):
    model = made_model()
    torch.nn.init.constant_(model.conf[2].bias, float("nan"))
    broken = Detector(model, ("cat", "cup", "person"))
    with pytest.raises(NonFiniteError, match=r"chelsea\.jpg.*NaN"):
        broken(photo)


def test_nan_for_one_image_leaves_the_others(detector, photos, monkeypatch):
    """As if fp16 overflowed for the second image alone."""
    own = copy.copy(detector)
    second = resize(load_image(photos / "chelsea.jpg"), 300)

    def overflowing(pixels):
        loc, conf = detector.backend.forward(pixels)
        bad = torch.tensor([torch.equal(image, second) for image in pixels])
        return loc, conf.where(~bad[:, None, None], float("nan"))

    own.backend = replace(detector.backend, forward=overflowing)
    errors = []
    found = list(own.stream(photos, on_error=lambda name, error: errors.append((name, type(error))), **LOW))
    assert [each.source for each in found] == [
        str(photos / f"{name}.jpg") for name in ("astronaut", "coffee")
    ]
    assert errors == [(str(photos / "chelsea.jpg"), NonFiniteError)]
    numbers = []
    list(own.stream(photos, on_error=lambda _, error: numbers.append((error.source, error.number))))
    assert numbers == [(str(photos / "chelsea.jpg"), 1)]
    with pytest.raises(NonFiniteError, match=rf"^{photos}/chelsea\.jpg: "):
        list(own.stream(photos))


def test_a_detector_keeps_its_own_copy_in_eval_mode(photo):
    model = made_model().train()
    detector = Detector(model, ("cat", "cup", "person"))
    before = detector(photo, **LOW)
    torch.nn.init.zeros_(model.conf[0].weight)
    assert same(detector(photo, **LOW), before)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_names_must_fit_the_model(small_model):
    with pytest.raises(ValueError, match="needs 3 names; got 2"):
        Detector(small_model, ("cat", "cup"))


def test_threads_give_what_one_thread_gives(detector, photos):
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    expected = [detector(path, **LOW) for path in paths]
    wrong = []

    def work():
        for _ in range(5):
            wrong.extend(
                path
                for path, right in zip(paths, expected, strict=True)
                if not close(detector(path, **LOW), right)
            )

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- Loading, precision, devices ---


def test_load(detector, weights_file, photo):
    loaded = Detector.load(weights_file, "cpu", "fp32")
    assert loaded.class_names == ("cat", "cup", "person")
    assert same(loaded(photo, **LOW), detector(photo, **LOW))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_finds_much_the_same(detector, weights_file, photo, precision):
    half = Detector.load(weights_file, "cpu", precision)
    assert half.precision == precision
    found, expected = half(photo, **LOW), detector(photo, **LOW)
    assert found.boxes.dtype == np.float32
    assert abs(len(found) - len(expected)) <= 0.2 * len(expected)
    assert abs(found.scores[0] - expected.scores[0]) < 0.05


def test_a_device_that_is_not_there_is_named(weights_file):
    if HAS_GPU:
        pytest.skip("there is a CUDA device")
    for device in ("cuda", "banana", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            Detector.load(weights_file, device=device)


def test_on_cuda_without_mixing_devices(fake_cuda, detector, small_model, photo):
    expected = detector(photo, **LOW)
    on_cuda = copy.copy(detector)
    on_cuda.device = torch.device("cuda")

    def forward(pixels):
        assert pixels.device.type == "cuda"
        return tuple(each.to("cuda") for each in small_model(normalize(pixels).cpu()))

    on_cuda.backend = replace(
        detector.backend,
        device=on_cuda.device,
        forward=forward,
        default_boxes=PUBLISHED_LAYOUT.default_boxes().to("cuda"),
    )
    assert close(on_cuda(photo, **LOW), expected)


def test_a_network_on_cuda_keeps_all_of_it_there(fake_cuda, detector, small_model, photo):
    """The whole way of `Detector.load`, but for moving the weights, which the pretended device cannot do."""
    model = copy.deepcopy(small_model)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(value.to("cuda"), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to("cuda")
    on_cuda = Detector(of_model(model, "fp32"), detector.class_names)
    assert on_cuda.backend.default_boxes.device.type == "cuda"
    assert close(on_cuda(photo, **LOW), detector(photo, **LOW))


@pytest.mark.cuda
def test_a_real_gpu_finds_what_the_cpu_finds(detector, weights_file, photos):
    on_gpu = Detector.load(weights_file)
    assert on_gpu.device.type == "cuda"
    for found, expected in zip(on_gpu.stream(photos, **LOW), detector.stream(photos, **LOW), strict=True):
        assert abs(len(found) - len(expected)) <= 0.2 * len(expected)
        np.testing.assert_allclose(found.scores[0], expected.scores[0], atol=0.02)


# --- Other processes ---


def detect_there(detector, path):
    return detector(path, **LOW)


@pytest.mark.parametrize("way", ["copy", "file", "process"])
def test_a_detector_can_be_copied_and_pickled(detector, photo, way):
    expected = detector(photo, **LOW)
    if way == "copy":
        found = copy.deepcopy(detector)(photo, **LOW)
    elif way == "file":
        found = pickle.loads(pickle.dumps(detector))(photo, **LOW)
    else:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(detect_there, detector, photo).result(timeout=100)
    assert close(found, expected)
    assert (found.class_names, found.source) == (expected.class_names, expected.source)


# --- Many images ---


def test_the_next_batch_is_computed_while_results_are_used(detector, photos):
    started = [threading.Event() for _ in range(3)]
    calls = iter(started)

    def forward(pixels):
        next(calls).set()
        return detector.backend.forward(pixels)

    own = copy.copy(detector)
    own.backend = replace(detector.backend, forward=forward)
    read = [(name, i, own.read(photos / f"{name}.jpg", i)) for i, name in enumerate(PHOTOS)]
    own._read_ahead = lambda *_, **__: iter(read)  # reading is done
    results = own.stream(photos, batch_size=1, **LOW)
    next(results)
    assert started[1].wait(60)  # nobody has asked for the second result yet
    assert not started[2].is_set()
    assert len(list(results)) == 2


def test_an_image_that_cannot_be_read_stops_the_stream_after_the_results_before_it(detector, photos):
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    found = []
    with pytest.raises(FileNotFoundError):
        for each in detector.stream([*paths, photos / "gone.jpg", *paths], batch_size=2, **LOW):
            found.append(each.source)
    assert found == [str(path) for path in paths]


@pytest.mark.parametrize("stop", [True, False])
def test_what_is_wrong_in_the_network_comes_out_of_the_stream(detector, photos, stop):
    def forward(pixels):
        raise RuntimeError("out of memory")

    own = copy.copy(detector)
    own.backend = replace(detector.backend, forward=forward)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(own.stream(photos, on_error=None if stop else lambda *_: None))
    for thread in threading.enumerate():
        if thread.name.startswith("ssd-"):
            thread.join(60)
    assert threading.active_count() <= before


@pytest.mark.slow
def test_memory_files_and_threads_stay_flat_over_2000_images(detector, tmp_path):
    """All but the network, which benchmarks/soak.py adds: here it answers at once."""
    rng = np.random.default_rng(0)
    for number in range(40):
        height, width = rng.integers(40, 700, 2)
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((int(width), int(height)))
        image.convert("L" if number % 5 == 0 else "RGB").save(
            tmp_path / f"{number}.{'png' if number % 4 == 0 else 'jpg'}"
        )
    answers = detector.backend.forward(torch.zeros(8, 300, 300, 3, dtype=torch.uint8))
    own = copy.copy(detector)
    own.backend = replace(
        detector.backend, forward=lambda pixels: tuple(each[: len(pixels)] for each in answers)
    )
    paths = sorted(tmp_path.iterdir())
    sources = (paths[i % len(paths)] for i in range(2000))
    seen = []
    for number, found in enumerate(own.stream(sources, **LOW), start=1):
        assert found.source == str(paths[(number - 1) % len(paths)])
        if number % 200 == 0:
            seen.append((memory(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert number == 2000
    megabytes, files, threads = (np.array(each, float) for each in zip(*seen[2:], strict=True))
    assert np.polyfit(np.arange(len(megabytes)) * 200, megabytes, 1)[0] * 2000 < 60
    assert files.max() - files.min() <= 6  # those that are being read
    assert threads.max() == threads[0]  # those that read have ended with the last image


def memory():
    """Resident, in megabytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled(detector, weights_file, photos):
    compiled = Detector.load(weights_file, "cpu", "fp32", compile=True)
    assert repr(compiled) == "Detector(3 classes, fp32, cpu, torch, compiled)"
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    found, expected = compiled(paths, **LOW), detector(paths, **LOW)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


# --- Photos that are large ---


class Watch:
    """Which of the images that were read are in memory, and the most pixels that were at a time."""

    def __init__(self, monkeypatch):
        self.images, self.most, self._lock = [], 0, threading.Lock()
        load, shrink = detector_module.load_scaled, detector_module.resize

        def noted_load(*arguments, **options):
            image, size = load(*arguments, **options)
            with self._lock:
                self.images.append((weakref.ref(image), size[0] * size[1]))
            return image, size

        def noted_resize(*arguments):
            resized = shrink(*arguments)
            with self._lock:
                self.most = max(self.most, self.alive())
            return resized

        monkeypatch.setattr(detector_module, "load_scaled", noted_load)
        monkeypatch.setattr(detector_module, "resize", noted_resize)

    def alive(self):
        return sum(pixels for image, pixels in self.images if image() is not None)


def test_results_keep_no_pixels_of_files(detector, photos, server, monkeypatch):
    watch = Watch(monkeypatch)
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    url = server.serve("/a.jpg", paths[0].read_bytes(), kind="image/jpeg")
    with paths[2].open("rb") as file:
        sources = [*paths, url, paths[1].read_bytes(), file]
        found = detector(sources, batch_size=2, **LOW)
    one = detector(paths[0], **LOW)
    gc.collect()
    assert len(watch.images) == len(sources) + 1
    assert watch.alive() == 0
    expected = [*paths, paths[0], paths[1], paths[2], paths[0]]
    for each, path in zip([*found, one], expected, strict=True):
        assert each.has_image
        np.testing.assert_array_equal(np.asarray(each.image), np.asarray(load_image(path)))
    assert server.requests == ["/a.jpg"]


def test_images_in_memory_are_kept_as_they_were(detector, photo):
    frame = np.array(load_image(photo))
    before = frame.copy()
    [found] = detector([frame])
    frame[:] = 0  # as a camera's buffer that is used again
    np.testing.assert_array_equal(np.asarray(found.image), before)


def test_so_many_pixels_are_read_at_a_time(detector, tmp_path, monkeypatch):
    """Of photos of 60,000 pixels, two fit the room; one of 200,000 has it alone."""
    room = Room(130_000)
    monkeypatch.setattr(detector_module, "DECODED", room)
    monkeypatch.setattr(detector_module.os, "cpu_count", lambda: 8)
    for number in range(12):
        size = (500, 400) if number == 5 else (300, 200)
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    watch = Watch(monkeypatch)
    assert len(list(detector.stream(tmp_path))) == 12
    assert len(watch.images) == 12
    assert watch.most <= 200_000
    small = [pixels for _, pixels in watch.images if pixels == 60_000]
    assert len(small) == 11
    assert room._free == room.pixels
    Image.new("RGB", (300, 200)).save(tmp_path / "06.png", "JPEG")
    (tmp_path / "07.png").write_bytes((tmp_path / "06.png").read_bytes()[:400])
    errors = []
    assert len(list(detector.stream(tmp_path, on_error=lambda *each: errors.append(each)))) == 11
    assert len(errors) == 1
    assert room._free == room.pixels


def test_the_limit_of_pixels_can_be_lifted(detector, photo):
    with pytest.raises(ImageError, match=r"chelsea\.jpg"):
        detector(photo, max_pixels=135_299)
    [found] = detector.stream([photo], max_pixels=135_300)
    assert found.image.size == (451, 300)


# --- Processes that are forked ---

FORKED = """
import os, signal, sys, warnings
import numpy as np, torch
from ssd.detector import Detector

warnings.simplefilter("ignore")  # Python's own, that threads are not forked
torch.set_num_threads(2)
detector = Detector.load(sys.argv[1], "cpu")
image = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
expected = [each.to_dict() for each in detector([image] * 3)]
begun = detector.stream(iter([image] * 40), batch_size=1)
next(begun)
child = os.fork()
if not child:
    signal.alarm(60)  # which ends it where it hangs
    try:
        print([each.to_dict() for each in detector([image] * 3)] == expected, flush=True)
        print(Detector.load(sys.argv[1], "cpu")(image).to_dict()["detections"] == expected[0]["detections"])
        next(begun)
    except RuntimeError as error:
        print(error, flush=True)
    del detector, begun
    os._exit(0) if sys.argv[1].endswith(".onnx") else sys.exit(0)  # ONNX Runtime's own end hangs
print("ended with", os.waitpid(child, 0)[1])
print(len(list(begun)), torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("kind", ["checkpoint", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_forked_process_answers(kind, weights_file, request):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    file = weights_file if kind == "checkpoint" else request.getfixturevalue("exported")["onnx"]
    run = subprocess.run(
        [sys.executable, "-c", FORKED, str(file)], capture_output=True, text=True, timeout=120, check=False
    )
    lines = run.stdout.splitlines()
    assert lines[:2] == ["True", "True"], run.stderr
    assert "this stream was begun in the process that this one was forked from" in lines[2]
    assert lines[3:] == ["ended with 0", "39 2"]


def test_frames_are_read_ahead_by_their_pixels(detector, monkeypatch):
    """Of 16 that may wait, only 3, whose pixels fill the room."""
    monkeypatch.setattr(detector_module, "DECODED", Room(29_999))
    monkeypatch.setattr(detector_module.os, "cpu_count", lambda: 2)
    asked = []

    def frames():
        for number in range(40):
            asked.append(number)
            yield np.zeros((100, 100, 3), np.uint8) if number % 2 else Image.new("RGB", (100, 100))

    found = detector.stream(frames(), batch_size=8)
    next(found)
    assert len(asked) <= 8 + 8 + 3
    assert len(list(found)) == 39


def test_a_stream_takes_an_array_of_paths_and_no_single_image(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    detector = Detector(made_model(num_classes=3), ["cat", "dog"])
    for kind in (object, str):
        assert len(list(detector.stream(np.array([str(path)] * 2, kind)))) == 2
    with path.open("rb") as file:
        for one in (file, bytearray(path.read_bytes()), np.zeros((30, 40, 3), np.uint8)):
            with pytest.raises(TypeError, match="for one, call the detector"):
                detector.stream(one)


def test_tiles_of_an_image_that_is_no_larger_change_nothing(detector, photo):
    assert same(detector(photo, tiles=451, **LOW), detector(photo, **LOW))


@pytest.mark.parametrize("options", [{}, {"voting": True, "flips": True}])
def test_each_tile_is_seen_as_an_image_of_its_own(detector, photo, options):
    """At an IoU of 1 nothing goes but cut boxes, and of equal ones, which voting makes, the lower scores.

    So the others of all tiles are there, where they belong.
    """
    image, options = load_image(photo), options | LOW | {"iou_threshold": 1, "max_detections": 2000}
    windows, every, whole = cut(*image.size, 200), [], []
    for window, found in zip(
        windows, detector([image.crop(each) for each in windows], **options), strict=True
    ):
        boxes = found.boxes + np.array([*window[:2], *window[:2]], np.float32)
        every.append(np.column_stack([boxes, found.scores * 1e3, found.class_ids * 1e3]))
        # Not within two pixels of where the tile ends and the image does not.
        low, high = np.array(window[:2]), np.array(window[2:])
        inside = (boxes[:, :2] >= np.where(low > 0, low + 2, 0)).all(1)
        inside &= (boxes[:, 2:] <= np.where(high < image.size, high - 2, high)).all(1)
        whole.append(every[-1][inside])
    tiled = detector(image, tiles=200, **options)
    rows = np.column_stack([tiled.boxes, tiled.scores * 1e3, tiled.class_ids * 1e3])

    def are_in(some, others):
        return all(np.isclose(others, row, atol=0.2).all(1).any() for row in some)

    assert are_in(rows, np.concatenate(every))
    without_score = [0, 1, 2, 3, 5]
    assert are_in(np.concatenate(whole)[:, without_score], rows[:, without_score])
    assert sum(map(len, whole)) > 20


def test_tiles_in_streams_and_lists_are_those_of_single_images(detector, photos):
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    expected = [detector(path, tiles=200, **LOW) for path in paths]
    for results in (
        detector(paths, tiles=200, **LOW),
        list(detector.stream(photos, tiles=200, batch_size=2, **LOW)),
    ):
        assert [each.source for each in results] == [each.source for each in expected]
        assert all(close(a, b) for a, b in zip(results, expected, strict=True))


def pooled(model, image, iou_threshold):
    """Boxes, scores and class ids from an image and, decoded by itself, its mirror image."""
    parts = []
    for view in (image, ImageOps.mirror(image)):
        with torch.no_grad():
            loc, conf = model(evaluation_transform(view, 300)[None])
        boxes, scores = decode(loc[0].T, PUBLISHED_LAYOUT.default_boxes()), conf[0].softmax(0)[1:]
        if view is not image:
            boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
        class_ids, index = (scores > 0.3).nonzero(as_tuple=True)
        parts.append((boxes[index], scores[class_ids, index], class_ids))
    boxes, scores, class_ids = map(torch.cat, zip(*parts, strict=True))
    kept = batched_nms(boxes, scores, class_ids, iou_threshold)[:100]
    boxes = boxes[kept].clamp(0, 1) * torch.tensor([*image.size] * 2)
    return boxes, scores[kept], class_ids[kept]


def test_flips_are_what_is_found_in_both_images(detector, small_model, photo):
    image = load_image(photo)
    boxes, scores, class_ids = pooled(small_model, image, 0.5)
    found = detector(image, flips=True, **LOW)
    assert len(found) > len(detector(image, **LOW))
    assert found.class_ids.tolist() == class_ids.tolist()
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, boxes, atol=0.05)


@pytest.mark.parametrize("voting", [False, True])
def test_with_flips_the_mirror_image_gives_the_mirrored_boxes(detector, photo, voting):
    image = load_image(photo).resize((300, 300))
    found, other = (
        detector(each, flips=True, voting=voting, **LOW) for each in (image, ImageOps.mirror(image))
    )
    mirrored = np.stack(
        [300 - other.boxes[:, 2], other.boxes[:, 1], 300 - other.boxes[:, 0], other.boxes[:, 3]]
    )
    assert len(found) > 3
    assert close(found, replace(other, boxes=mirrored.T, image=None))


@pytest.mark.parametrize("options", [{"voting": True}, {"flips": True}, {"voting": True, "flips": True}])
def test_voting_and_flips_in_streams_are_those_of_single_images(detector, photos, options):
    paths = sorted(photos.iterdir())
    expected = [detector(path, **LOW, **options) for path in paths]
    assert not all(close(a, b) for a, b in zip(expected, detector(paths, **LOW), strict=True))
    found = list(detector.stream(photos, batch_size=2, **LOW, **options))
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert all((np.diff(each.scores) <= 0).all() for each in found)


def test_small_objects_of_a_large_image_are_found_in_tiles():
    """Sixteen scenes in one picture, each as large as what the network was trained on."""
    rng = np.random.default_rng(0)
    whole, truth = Image.new("RGB", (1200, 1200)), []
    for i in range(16):
        scene, boxes, labels = draw_scene(rng)
        corner = np.array([300 * (i % 4), 300 * (i // 4)] * 2)
        whole.paste(scene.resize((300, 300)), tuple(corner[:2].tolist()))
        scale = 300 / np.array([*scene.size] * 2)
        truth += [(box * scale + corner, label - 1) for box, label in zip(boxes, labels, strict=True)]
    own = Detector.load("shapes", "cpu", "fp32")

    def count(**options):
        found = own(whole, **options)
        overlaps = box_iou(
            torch.tensor(np.array([box for box, _ in truth])).float(), torch.tensor(found.boxes)
        )
        return sum(
            bool((each[torch.tensor(found.class_ids == class_id)] > 0.5).any())
            for each, (_, class_id) in zip(overlaps, truth, strict=True)
        )

    assert count() < 0.4 * len(truth)
    assert count(tiles=300) > 0.7 * len(truth)


def test_what_tiles_cannot_be(detector, photo):
    with pytest.raises(ValueError, match="tiles are at least 32 pixels wide; got 8"):
        detector(photo, tiles=8)
    with pytest.raises(ValueError, match="tiles need the whole image; leave scaled_decoding out"):
        detector.stream([photo], tiles=300, scaled_decoding=True)


def test_an_image_with_a_tile_that_gives_no_numbers_is_named(detector, photo):
    forward = detector.backend.forward

    def poisoned(pixels):
        loc, conf = forward(pixels)
        conf = conf.clone()
        conf[3:4] = float("nan")  # a tile of the second image
        return loc, conf

    own = copy.copy(detector)
    own.backend = replace(detector.backend, forward=poisoned, rebuild=None)
    small = load_image(photo).resize((64, 64))
    images = [Named("a", small), Named("b", load_image(photo))]
    errors = []
    found = list(
        own.stream(images, tiles=300, on_error=lambda name, error: errors.append((name, error.number)))
    )
    assert errors == [("b", 1)]
    assert [each.source for each in found] == ["a"]


def test_a_batch_is_as_large_as_one_asks(detector):
    """More than the views of tiled images that go together."""
    sizes = []

    def recorded(pixels):
        sizes.append(len(pixels))
        return detector.backend.forward(pixels)

    own = copy.copy(detector)
    own.backend = replace(detector.backend, forward=recorded, rebuild=None)
    images = [Image.new("RGB", (40, 30))] * 70
    assert len(own(images, batch_size=66, score_threshold=0.9)) == 70
    assert sizes == [66, 4]
