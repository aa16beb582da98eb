"""Films as they come: their times, how they are turned, their colours, and where they break off."""

import errno
import json
import re
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from made_films import drawn, number_of, steady, write_film
from PIL import Image

from ssd import sources, video
from ssd.detector import Detector
from ssd.errors import ImageError
from ssd.frames import Playback, frames_of
from ssd.sources import Film, Named, find_all, find_images

FRAMES = [drawn(i) for i in range(40)]
ODD = Fraction(1001, 30000)
UNEVEN = [Fraction(n) for n in (0, 1, 2, 10, 11, 30)] + [Fraction(31 + 3 * n) for n in range(34)]
H264 = {"codec": "libx264", "pixels": "yuv420p"}


def read(path, **options):
    return list(frames_of(Film(str(path)), **options))


def pixels(path):
    return [each.pixels for each in read(path)]


# --- Times ---


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov", ".avi", ".ts"])
def test_frames_and_times_of_a_steady_film(tmp_path, suffix):
    lossless = suffix in (".mkv", ".avi")
    how = {} if lossless else {**H264, "options": {"crf": "10"}}
    path = write_film(tmp_path / f"a{suffix}", FRAMES, **how)
    found = read(path)
    assert [number_of(each.pixels) for each in found] == list(range(40))
    assert [each.number for each in found] == list(range(40))
    assert [each.time for each in found] == [n / 25 for n in range(40)]
    if lossless:
        assert all(np.array_equal(each.pixels, frame) for each, frame in zip(found, FRAMES, strict=True))


@pytest.mark.parametrize(
    ("suffix", "base"), [(".mp4", ODD), (".mp4", Fraction(1, 600)), (".mkv", Fraction(1, 1000))]
)
@pytest.mark.parametrize("ticks", ["steady", "uneven"])
def test_times_are_those_of_the_stream(tmp_path, suffix, base, ticks):
    """Not a count: of odd rates, and of rates that vary, to the tick of the film's clock."""
    step = 1 if base == ODD else 20
    times = [(Fraction(n) if ticks == "steady" else UNEVEN[n]) * step * base for n in range(40)]
    path = write_film(tmp_path / f"a{suffix}", FRAMES, times, base=base, **H264, options={"crf": "10"})
    found = read(path)
    assert [number_of(each.pixels) for each in found] == list(range(40))
    assert [each.time for each in found] == [float(time) for time in times]


def test_a_stream_that_starts_late_counts_from_its_start(tmp_path):
    times = [time + 60 for time in steady(10)]
    path = write_film(tmp_path / "a.ts", FRAMES[:10], times, **H264)
    assert [each.time for each in read(path)] == [n / 25 for n in range(10)]


def test_some_frames_of_a_film(tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES)
    found = read(path, playback=Playback(every=7))
    assert [(each.number, number_of(each.pixels)) for each in found] == [(n, n) for n in range(0, 40, 7)]
    assert [each.time for each in read(path, playback=Playback(max_fps=5))] == [n / 5 for n in range(8)]


def test_a_missing_first_key_frame(tmp_path):
    """What comes before the next one cannot be decoded, and the times of the rest stay."""
    path = write_film(tmp_path / "a.ts", FRAMES, **H264, options={"g": "20", "bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as whole, av.open(str(tmp_path / "late.ts"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if packet.size and number:
                packet.stream = stream
                cut.mux(packet)
    found = read(tmp_path / "late.ts")
    assert number_of(found[-1].pixels) == 39
    assert found[-1].time == pytest.approx(38 / 25, abs=1e-9)  # the film now starts with the second frame
    late = [(each.time, number_of(each.pixels)) for each in found if number_of(each.pixels) >= 20]
    assert late == [(pytest.approx((n - 1) / 25, abs=1e-9), n) for n in range(20, 40)]


# --- How they are turned ---


def _set_matrix(path, matrix):
    """Write the matrix of a track's header (ISO 14496-12, 8.3.2) by hand: a, b, u, c, d, v, x, y, w."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    content[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # clockwise, as a phone held upright writes it
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
    ],
)
def test_films_are_turned_upright(tmp_path, matrix, turn):
    path = write_film(
        tmp_path / "a.mp4", FRAMES[:3], codec="libx264rgb", pixels="rgb24", options={"crf": "0"}
    )
    before = pixels(path)
    _set_matrix(path, matrix)
    for plain, found in zip(before, pixels(path), strict=True):
        expected = Image.fromarray(plain) if turn is None else Image.fromarray(plain).transpose(turn)
        assert np.array_equal(found, np.asarray(expected))


# --- Colours ---


def test_ten_bits_are_told_once(tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES[:5], pixels="yuv444p10le")
    with pytest.warns(UserWarning, match=r"a\.mkv: has 10 bits a value") as told:
        found = pixels(path)
    assert len(told) == 1
    for each, frame in zip(found, FRAMES[:5], strict=True):
        assert np.abs(each.astype(int) - frame).max() <= 3


def test_the_matrix_that_a_film_names_is_used(tmp_path):
    """BT.709 by hand: of a plain colour, luma and colour differences of 8 bits in the narrow range."""
    frame = np.full((48, 64, 3), (200, 40, 90), np.uint8)
    r, g, b = frame[0, 0] / 255
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    planes = [16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748]
    made = av.VideoFrame(64, 48, "yuv444p")
    for plane, value in zip(made.planes, planes, strict=True):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace = 1
        made.colorspace, made.pts = 1, 0
        file.mux(stream.encode(made))
        file.mux(stream.encode(None))
    assert np.abs(pixels(path)[0].astype(int) - frame).max() <= 2


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_mapped(tmp_path, transfer, name):
    """A scale of grey: darkest and brightest stay so, and what is the white of paper comes out bright."""
    white = {16: 0.58, 18: 0.75}[transfer]  # of ITU-R BT.2408: 203 nits
    values = np.array([0, white / 2, white, 1])
    frame = np.repeat(np.round(255 * values), 16).astype(np.uint8)
    frame = np.broadcast_to(frame[None, :, None], (48, 64, 3)).copy()
    path = write_film(
        tmp_path / "a.mp4",
        [frame] * 2,
        codec="libx264",
        pixels="yuv420p10le",
        options={"crf": "0"},
        tags={"color_trc": transfer, "colorspace": 9, "color_primaries": 9},
    )
    with pytest.warns(UserWarning, match=rf"high dynamic range \({name}\)") as told:
        found = pixels(path)[0]
    assert len(told) == 1
    greys = found[24, 8::16].astype(int)
    assert np.abs(greys - greys[:, :1]).max() <= 3
    assert greys[0].max() <= 2
    assert 20 < greys[1, 0] < 120
    assert 170 < greys[2, 0] < 215
    assert greys[3].min() >= (250 if name == "PQ" else 225)


def test_the_curve_of_pq_at_known_points():
    """SMPTE ST 2084: a signal of 0.5081 is 100 nits, 0.7518 is 1,000."""
    table = video._to_sdr(16)
    light = 100 / 203
    expected = light * (1 + light / 25) / (1 + light)
    assert table[round(0.5081 * 65535)] == pytest.approx(255 * (1.055 * expected ** (1 / 2.4) - 0.055), abs=1)
    assert (np.diff(table.astype(int)) >= 0).all()


# --- What is no whole film ---


def test_a_film_that_ends_early(tmp_path):
    """All frames before the place come, then an error that says where it is."""
    path = write_film(tmp_path / "a.mkv", FRAMES)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found = frames_of(Film(str(path)))
    numbers = []
    with pytest.raises(
        ImageError, match=r"a\.mkv: breaks off at \d\.\d\d s, after frame \d+ \(it ends"
    ) as told:
        numbers.extend(number_of(each.pixels) for each in found)
    assert 10 < len(numbers) < 30
    assert numbers == list(range(len(numbers)))
    assert f"after frame {len(numbers) - 1} " in str(told.value)
    assert f"at {(len(numbers) - 1) / 25:.2f} s" in str(told.value)


@pytest.mark.parametrize("written", [b"00:00:1/0", b"00:00:1e99999999", b"00:nan:00", b"99:00:01.5"])
def test_a_length_that_a_damaged_film_gives(tmp_path, written):
    """What is no time says nothing; a time says that the film is cut."""
    path = write_film(tmp_path / "a.mkv", FRAMES[:5])
    whole = path.read_bytes()
    (said,) = re.findall(rb"00:00:00\.\d{9}", whole)
    path.write_bytes(whole.replace(said, written.ljust(len(said), b"\0")))
    with pytest.raises(ImageError, match="it ends after 0") if b".5" in written else nullcontext():
        assert len(list(frames_of(Film(str(path))))) == 5


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *(("mp4", part) for part in (0.3, 0.6, 0.9, 0.99)),
        *(("avi", part) for part in (0.3, 0.6, 0.9)),
        ("fragments", 0.3),  # of which nothing can be known that is cut between two
    ],
)
def test_every_cut_is_told(tmp_path, kind, part):
    suffix, container = (".avi", {}) if kind == "avi" else (".mp4", {"movflags": "faststart"})
    if kind == "fragments":
        container = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    how = {"codec": "mjpeg", "pixels": "yuvj420p"} if kind == "avi" else {**H264, "options": {"g": "5"}}
    path = write_film(tmp_path / f"a{suffix}", FRAMES, container=container, **how)
    whole = path.read_bytes()
    end = whole.rindex(b"mdat") if kind != "avi" else whole.rindex(b"idx1")
    path.write_bytes(whole[: int(end * part) if kind == "avi" else int(len(whole) * part)])
    numbers = []
    with pytest.raises(ImageError, match=r"breaks off|without moving pictures|cannot be opened"):
        numbers.extend(number_of(each.pixels) for each in frames_of(Film(str(path))))
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 40 * part - 14


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(
    ("damage", "damaged"),
    [
        ({1: "no picture", 3: "no picture"}, 2),
        ({1: "made up", 2: "made up"}, 2),
        ({2: "cut"}, 1),  # within the film, where it goes on
        ({0: "made up", 1: "no picture", 3: "cut"}, 3),
        ({}, 0),
    ],
)
def test_each_damaged_picture_counts_once(monkeypatch, timed, damage, damaged):
    class Stream:
        def decode(self, packet):
            kind = damage.get(packet.number)
            if kind == "no picture":
                raise av.InvalidDataError(1, "damaged")
            return [SimpleNamespace(pts=packet.pts, is_corrupt=kind == "made up")]

    def demux(stream):
        for number in range(5):
            at = number if timed else None
            what = {"pts": at, "dts": at, "duration": 1, "time_base": Fraction(1, 25)}
            yield SimpleNamespace(number=number, size=9, is_corrupt=damage.get(number) == "cut", **what)

    container = SimpleNamespace(demux=demux, format=SimpleNamespace(name="avi"))
    packets = video._Packets(container, Stream(), "a.avi")
    monkeypatch.setattr(packets, "_missing", lambda: "")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        frames = list(packets.frames())
    assert len(frames) == 5 - sum(kind != "made up" for kind in damage.values())
    texts = [f"a.avi: at least {damaged} of 5 pictures are damaged: they look wrong, or were left out"]
    assert [str(one.message) for one in told] == texts * bool(damaged)


@pytest.mark.parametrize("damage", ["marked", "lost"])
def test_what_was_damaged_on_the_way_is_told(tmp_path, damage):
    """In a transport stream (ISO 13818-1, 2.4.3.2), whose decoder makes up what is missing."""
    frames = [drawn(i, (640, 480)) for i in range(24)]
    path = write_film(tmp_path / "a.ts", frames, **H264, options={"crf": "1", "bf": "0"})
    whole, content = pixels(path), path.read_bytes()
    packets = [bytearray(content[at : at + 188]) for at in range(0, len(content), 188)]
    of_pictures = [i for i, each in enumerate(packets) if each[1] & 0x1F == 1 and each[2] == 0]
    starts = [i for i in of_pictures if packets[i][1] & 0x40]
    for number in (19, 12, 5):
        if damage == "marked":
            packets[starts[number]][1] |= 0x80
        else:
            del packets[starts[number] + 1]
    path.write_bytes(b"".join(packets))
    with pytest.warns(UserWarning, match=r"a\.ts: at least \d+ of 24 pictures are damaged: they") as told:
        found = pixels(path)
    assert len(told) == 1
    count = int(str(told[0].message).split("at least ")[1].split()[0])
    wrong = sum(not np.array_equal(a, b) for a, b in zip(found, whole, strict=True))
    assert count == 3 if damage == "marked" else 3 <= count <= wrong
    assert wrong == 0 if damage == "marked" else wrong < 24


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"a\.mp4: is an empty file; get it again"),
        (b"\0\0\0\x18ftypisom" + bytes(300), "cannot be opened as a film"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "cannot be opened"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "cannot be opened as a film"),
    ],
)
def test_what_is_no_film(tmp_path, content, reason):
    """Among it playlists, which would have FFmpeg open what they name."""
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read(tmp_path / "a.mp4")


def test_nothing_but_the_file_is_opened(tmp_path):
    film = write_film(tmp_path / "b.ts", FRAMES[:5], **H264)
    (tmp_path / "a.mp4").write_text(f"ffconcat version 1.0\nfile {film}\n")
    with pytest.raises(ImageError, match="cannot be opened as a film"):
        read(tmp_path / "a.mp4")


def test_sound_alone(tmp_path):
    path = write_film(tmp_path / "a.mp4", FRAMES[:5], **H264, sound=True)
    with av.open(str(path)) as both, av.open(str(tmp_path / "s.mp4"), "w") as alone:
        stream = alone.add_stream_from_template(both.streams.audio[0])
        for packet in both.demux(both.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                alone.mux(packet)
    with pytest.raises(ImageError, match="without moving pictures"):
        read(tmp_path / "s.mp4")


def test_a_film_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "gone.mp4")


def test_limits_hold_as_for_images(tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES[:2])
    assert len(read(path, max_pixels=96 * 72)) == 2
    with pytest.raises(ImageError, match=r"a\.mkv: 96x72 is more than 6,911 pixels"):
        read(path, max_pixels=96 * 72 - 1)
    thin = write_film(tmp_path / "b.mkv", [np.zeros((2, 402, 3), np.uint8)])
    with pytest.raises(ImageError, match="too thin"):
        read(thin)


def test_a_name_of_any_bytes(tmp_path):
    folder = Path(str(tmp_path) + "/caf\udce9 \N{SNOWMAN} [1]")
    folder.mkdir()
    path = write_film(tmp_path / "a.mkv", FRAMES[:3]).rename(folder / "file:b|c.mkv")
    assert [each.image for each in find_images(path, films=True)] == [Film(str(path))]
    assert len(read(path)) == 3


# --- As a source ---


def test_films_in_a_folder(tmp_path):
    for name in ("b.MP4", "a.jpg", "c.mkv", "._c.mkv", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    told = []
    found = [
        (Path(each.name).name, isinstance(each.image, Film)) for each in find_images(tmp_path, films=True)
    ]
    assert found == [("a.jpg", False), ("b.MP4", True), ("c.mkv", True)]
    images = [Path(each.name).name for each in find_images(tmp_path, told.append)]
    assert images == ["a.jpg"]
    assert told == [{".mp4": 1, ".mkv": 1, ".txt": 1}]


def test_a_file_is_a_film_by_its_content(tmp_path):
    plain = str(write_film(tmp_path / "a.mkv", FRAMES[:2]).rename(tmp_path / "film"))
    picture = str(tmp_path / "b.mp4")
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    assert list(find_images(plain, films=True)) == [Named(plain, Film(plain))]
    assert list(find_images(plain)) == [Named(plain, plain)]
    assert list(find_images(picture, films=True)) == [Named(picture, picture)]
    assert list(find_all([plain, picture])) == [Named(plain, Film(plain)), Named(picture, picture)]


def test_without_the_package_films_are_left_out_of_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "reads_films", lambda: False)
    for name in ("a.jpg", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    told = []
    assert [Path(each.name).name for each in find_images(tmp_path, told.append, films=True)] == ["a.jpg"]
    assert sources.left_out_line("x", told[0]) == (
        "left out of x: 1 .mp4 (for .mp4: pip install 'ssd300[video]')"
    )


# --- Detection ---


@pytest.fixture(scope="module")
def detector(tiny_model):
    return Detector(tiny_model, ("cat", "cup", "person"))


def test_detections_are_those_of_the_frames_as_images(detector, tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES)
    found = list(detector.stream(path, score_threshold=0.2, batch_size=4))
    expected = detector(FRAMES, score_threshold=0.2, batch_size=4)
    assert sum(map(len, found)) > 0
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.source, ours.number, ours.frame, ours.time) == (str(path), 0, number, number / 25)
        assert (theirs.frame, theirs.time) == (None, None)
        assert np.array_equal(ours.boxes, theirs.boxes)
        assert np.array_equal(ours.scores, theirs.scores)
        assert np.array_equal(ours.class_ids, theirs.class_ids)
        assert np.array_equal(np.asarray(ours.image), FRAMES[number])


def test_a_folder_with_photos_and_films(detector, tmp_path):
    Image.fromarray(FRAMES[0]).save(tmp_path / "b.png")
    write_film(tmp_path / "a.mkv", FRAMES[:3])
    write_film(tmp_path / "c.mkv", FRAMES[:4])
    found = list(detector.stream(tmp_path, every=2))
    assert [(Path(each.source).name, each.number, each.frame) for each in found] == [
        ("a.mkv", 0, 0),
        ("a.mkv", 0, 2),
        ("b.png", 1, None),
        ("c.mkv", 2, 0),
        ("c.mkv", 2, 2),
    ]


def test_a_film_that_breaks_off_among_others(detector, tmp_path):
    for name in ("a.mkv", "b.mkv"):
        write_film(tmp_path / name, FRAMES)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])
    errors = []
    found = list(detector.stream(tmp_path, on_error=lambda name, error: errors.append((name, error))))
    first = [each.frame for each in found if each.source.endswith("a.mkv")]
    assert first == list(range(len(first)))
    assert len(found) == len(first) + 40
    ((name, error),) = errors
    assert name == error.source == str(tmp_path / "a.mkv")
    assert (error.number, error.frames) == (0, len(first))

    stream = detector.stream(tmp_path)
    results = []
    with pytest.raises(ImageError, match="breaks off"):
        results.extend(stream)
    assert len(results) == len(first)


def test_the_thread_ends_with_the_stream(detector, tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES)
    stream = detector.stream(path, batch_size=1)
    next(stream)
    stream.close()
    assert not [each for each in threading.enumerate() if each.name == "ssd-ahead"]


def test_a_process_ends_in_the_middle_of_a_film(tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES)
    code = (
        "import sys\nfrom ssd.frames import frames_of\nfrom ssd.sources import Film\n"
        f"found = frames_of(Film({str(path)!r}))\nprint(next(found).number)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def test_what_a_result_says(detector, tmp_path):
    path = write_film(tmp_path / "a.mkv", FRAMES[:2])
    _, found = detector.stream(path, score_threshold=0.2)
    as_dict = json.loads(found.to_json())
    assert (as_dict["frame"], as_dict["time"]) == (1, 0.04)
    header, first, *_ = found.to_csv().splitlines()
    assert header.endswith(",bottom,frame,time")
    assert first.endswith(",1,0.04")
    assert found[:1].frame == 1


# --- Writing ---


def raw_times(path, kind="video"):
    """As the packets of a file have them, with no start taken off."""
    with av.open(str(path)) as film:
        packets = list(film.demux(getattr(film.streams, kind)[0]))
        return [packet.pts * packet.time_base for packet in packets if packet.pts is not None]


def write_again(source, target, frames=None, like=True):
    with target.open("wb+") as file:
        writer = None
        for each in frames or read(source):
            picture = Image.fromarray(each.pixels)
            writer = writer or video.FilmWriter(file, picture.size, str(source) if like else None)
            writer.add(picture, each.time)
        writer.close()
    return target


@pytest.mark.parametrize("ticks", ["steady", "uneven"])
def test_a_written_film_has_the_size_and_the_times_of_its_source(tmp_path, ticks):
    times = [(Fraction(n) if ticks == "steady" else UNEVEN[n]) * ODD for n in range(40)]
    source = write_film(tmp_path / "a.mp4", FRAMES, times, base=ODD, **H264, options={"crf": "10"})
    target = write_again(source, tmp_path / "b.mp4")
    assert raw_times(target) == times
    found = read(target)
    assert [number_of(each.pixels) for each in found] == list(range(40))
    assert {each.pixels.shape for each in found} == {(72, 96, 3)}
    with av.open(str(target)) as film:
        assert film.streams.video[0].codec_context.name == "h264"
        assert film.streams.video[0].frames == 40  # not fragments, which some players cannot seek in


@pytest.mark.parametrize("size", [(97, 72), (96, 71), (97, 71)])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_odd_sides_get_one_more_pixel(tmp_path, size, codec, monkeypatch):
    """For what every player plays; what there is keeps its place, and is not scaled."""
    monkeypatch.setattr(video.av, "codecs_available", {codec})
    frames = [drawn(i, size) for i in range(3)]
    target = write_again(write_film(tmp_path / "a.mkv", frames), tmp_path / "b.mp4")
    with av.open(str(target)) as film:
        assert film.streams.video[0].codec_context.pix_fmt == "yuv420p"
    for found, frame in zip(pixels(target), frames, strict=True):
        assert found.shape == (72, size[0] + size[0] % 2, 3)
        whole = np.pad(frame, [(0, a - b) for a, b in zip(found.shape, frame.shape, strict=True)], "edge")
        assert np.abs(found.astype(int) - whole).mean() < 3


def test_a_film_that_starts_late_does_so_again(tmp_path):
    source = write_film(tmp_path / "a.mkv", FRAMES[:20])
    target = write_again(source, tmp_path / "b.mp4", read(source)[5:])
    assert raw_times(target) == [Fraction(n, 25) for n in range(5, 20)]


def test_sound_is_copied(tmp_path):
    source = write_film(tmp_path / "a.mp4", FRAMES, **H264, sound=True)
    target = write_again(source, tmp_path / "b.mp4")

    def sound(path):
        with av.open(str(path)) as film:
            packets = film.demux(film.streams.audio[0])
            return {p.pts * p.time_base: bytes(p) for p in packets if p.size and p.pts >= 0}

    before, after = sound(source), sound(target)
    assert len(after) > 20
    assert after.items() <= before.items()
    assert len(before) - len(after) <= 1  # what would go on after the pictures


def test_sound_that_mp4_cannot_hold_is_told_once(tmp_path):
    source = write_film(tmp_path / "a.avi", FRAMES[:9], sound="adpcm_ms")
    with pytest.warns(UserWarning, match=r"a\.avi: MP4 cannot hold its sound, of adpcm_ms") as told:
        target = write_again(source, tmp_path / "b.mp4")
    assert len(told) == 1
    assert raw_times(target) == steady(9)
    with av.open(str(target)) as film:
        assert not film.streams.audio


def test_sound_that_breaks_off_ends_with_that(tmp_path):
    """The pictures are others', and all of them are written."""
    source = write_film(tmp_path / "a.mkv", FRAMES, **H264, sound=True)
    frames = read(source)
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 3])
    target = write_again(source, tmp_path / "b.mp4", frames)
    assert raw_times(target) == steady(40)


def test_what_is_too_large_for_the_encoder_is_told(tmp_path):
    message = pytest.raises(ImageError, match=r"does not encode pictures of 40000x200 \(")
    with (tmp_path / "a.mp4").open("wb") as file, message:
        video.FilmWriter(file, (40_000, 200))


def test_the_shape_of_pixels_stays(tmp_path):
    path = write_film(tmp_path / "a.mp4", FRAMES[:3], **H264, tags={"sample_aspect_ratio": Fraction(4, 3)})
    with av.open(str(write_again(path, tmp_path / "b.mp4"))) as film:
        assert film.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_without_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(video.av, "codecs_available", {"mpeg4"})
    source = write_film(tmp_path / "a.ts", FRAMES, **H264)  # whose clock MPEG-4 cannot count
    target = write_again(source, tmp_path / "b.mp4")
    with av.open(str(target)) as film:
        assert film.streams.video[0].codec_context.name == "mpeg4"
    assert [round(time * 25, 6) for time in raw_times(target)] == list(range(40))
    assert [number_of(each.pixels) for each in read(target)] == list(range(40))


class Disk:
    """A file on a disk with so much room."""

    def __init__(self, file, room):
        self.file, self.room = file, room
        self.seek, self.tell = file.seek, file.tell

    def write(self, content):
        part = min(len(content), self.room)
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= part
        return self.file.write(content[:part])


def test_on_a_full_disk_what_is_written_can_be_played(tmp_path):
    frames = [drawn(i % 250) for i in range(200)]
    with (tmp_path / "whole.mp4").open("wb+") as file:
        writer = video.FilmWriter(file, (96, 72))
        for number, frame in enumerate(frames):
            writer.add(Image.fromarray(frame), number / 25)
        writer.close()
    size = (tmp_path / "whole.mp4").stat().st_size
    counts = []
    for room in (size // 4, size // 2, size * 3 // 4, size - 300):  # the last: only the new head has no room
        path = tmp_path / f"{room}.mp4"
        with path.open("wb+") as file:
            writer = video.FilmWriter(Disk(file, room), (96, 72))
            with pytest.raises(OSError, match="No space left"):
                for number, frame in enumerate(frames):
                    writer.add(Image.fromarray(frame), number / 25)
                writer.close()
            writer.close()
        assert video.is_playable(path)
        numbers = []
        with suppress(ImageError):  # it ends within a picture
            numbers.extend(number_of(each.pixels) for each in frames_of(Film(str(path))))
        assert numbers == list(range(len(numbers)))
        counts.append(len(numbers))
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1]
    assert counts[-1] >= 150


def test_what_was_never_begun_cannot_be_played(tmp_path):
    with (tmp_path / "a.mp4").open("wb+") as file:
        writer = video.FilmWriter(Disk(file, 20), (96, 72))
        with pytest.raises(OSError, match="No space left"):
            for number in range(80):
                writer.add(Image.fromarray(drawn(number)), number / 25)
        writer.close()
    assert not video.is_playable(tmp_path / "a.mp4")
