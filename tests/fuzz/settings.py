"""What says where a YOLO dataset is and what its classes are: YAML, darknet files, lists of images."""

import random

from fuzz.annotations import NAMES, NUMBERS, move, of_lines, promise, yolo
from fuzz.engine import OUTSIDE, Case, some_bytes

__all__ = ["mutate", "promise", "seeds"]

_BOMB = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(9))
_VALUES = (
    *(
        "[]",
        "{}",
        "~",
        "[images/train, images/val]",
        "{a: b}",
        "*k8",
        "[*k8, *k8]",
        "&x [*x]",
        "!!bool x",
        "!!int ''",
    ),
    *(
        "!!timestamp x",
        "!!binary x",
        "!!set {a, b}",
        "!!python/object/apply:os.system [x]",
        "<<",
        "? [a]",
        "- - - a",
    ),
    *(
        "'cat",
        '"\\ud800"',
        '"\\0"',
        '"\\e[31m"',
        "|\n  a\n  b",
        "[" * 500,
        "{a: " * 500,
        "0x10",
        "1e400",
        "²",
    ),
    *(
        "images",
        "images/val",
        "val.txt",
        "train.txt",
        "classes.txt",
        "../train/images",
        "labels/train",
        "/",
        "/etc",
    ),
    *(
        f"{OUTSIDE.decode()}/labels",
        f"{OUTSIDE.decode()}/none.txt",
        "/proc/self/root",
        "..",
        "../..",
        "/dev/zero",
    ),
)
_KEYS = (
    "train",
    "val",
    "test",
    "path",
    "names",
    "nc",
    "download",
    "kpt_shape",
    "<<",
    "Train",
    "0",
    "classes",
)


def seeds() -> list[Case]:
    plain = yolo()
    settings = plain.pop("data.yaml")
    darknet = b"classes = 2\ntrain = train.txt\nvalid = val.txt\nnames = obj.names\n"
    lists = {"train.txt": b"images/train/a.jpg\nimages/train/b.jpg\n"}
    bomb = _BOMB.encode() + settings
    return [
        plain | {"data.yaml": settings},
        plain | lists | {"data.yaml": b"train: train.txt\nval: [val.txt, images/val]\nnames: [cat, dog]\n"},
        plain | lists | {"obj.data": darknet, "obj.names": b"cat\ndog\n"},
        plain | {"classes.txt": b"cat\ndog\n"},
        plain | {"data.yaml": bomb},
    ]


def mutate(rng: random.Random, case: Case) -> Case:
    new = dict(case)
    for _ in range(rng.choice((1, 1, 2, 4))):
        texts = sorted(name for name in new if "/" not in name and not name.endswith("@"))
        if not texts or rng.random() < 0.1:
            move(rng, new, rng.choice(sorted(new)) if new else "data.yaml")
            continue
        name = rng.choice(texts)
        if rng.random() < 0.15:
            new[name] = some_bytes(rng, new[name])
        elif name.endswith((".yaml", ".data")) and rng.random() < 0.7:
            new[name] = _of_settings(rng, new[name], " = " if name.endswith(".data") else ": ")
        else:
            new[name] = of_lines(rng, new[name])
    return new


def _of_settings(rng: random.Random, content: bytes, sign: str) -> bytes:
    """Another value of a key, a key more, or one less."""
    lines = content.decode(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    key = rng.choice((lines[at].split(sign)[0], rng.choice(_KEYS)))
    inside = [each for each in NAMES if "marker" not in each]
    value = str(rng.choice((rng.choice(_VALUES), rng.choice(inside), rng.choice(NUMBERS))))
    way = rng.randrange(4)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(at, f"{key}{sign}{value}")
    else:
        lines[at] = f"{key}{sign}{value}"
    return "\n".join(lines).encode(errors="surrogatepass")
