"""The ids of images and classes in COCO results."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssd.data.builder import read_text
from ssd.data.names import loose, named_parts, written_parts
from ssd.errors import AnnotationError, UserError


class CocoIds:
    """The ids of images and classes in COCO results, by one rule for all.

    Args:
        rule: that gave the ids of images, as the command tells it.
        images: ids by source.
        counting: whether images that have no id get the next number; else they stay without.
        categories: an id for each class of the model; empty for those that its detections have.
        notes: lines on what does not fit.
        frames: whether the frames of films get ids, the next numbers; else they stay without.
    """

    def __init__(
        self,
        rule: str,
        images: dict[str, int | str],
        *,
        counting: bool = False,
        categories: tuple[int, ...] = (),
        notes: tuple[str, ...] = (),
        frames: bool = True,
    ) -> None:
        self.rule, self.categories, self.notes = rule, categories, notes
        self._images, self._counting, self._frames = images, counting, frames
        self._last = max((each for each in images.values() if isinstance(each, int)), default=0)

    def of(self, source: str, frame: int | None = None) -> int | str | None:
        """The id of an image; None if it has none. The frames of films are counted on, each time anew."""
        if frame is not None:
            self._last += 1
            return self._last if self._frames else None
        if self._counting and source not in self._images:
            self._last += 1
            self._images[source] = self._last
        return self._images.get(source)


def ids_by_name(sources: Sequence[str]) -> CocoIds:
    """COCO names files by image id (000000397133.jpg); where any name is not so, all are numbered."""
    stems = [os.path.splitext(os.path.basename(source))[0] for source in sources]
    if stems and all(stem.isascii() and stem.isdigit() for stem in stems):
        ids: dict[str, int | str] = {source: int(stem) for source, stem in zip(sources, stems, strict=True)}
        if len(set(ids.values())) == len(ids):
            return CocoIds("image ids are the numbers that the files are called by", ids)
    ids = {source: number for number, source in enumerate(dict.fromkeys(sources), start=1)}
    rule = "image ids count from 1, as the images come; --annotations FILE takes those of a dataset"
    return CocoIds(rule, ids, counting=True)


def ids_of_file(file: Path, sources: Sequence[str], class_names: Sequence[str]) -> CocoIds:
    """The ids that a COCO file has for images and classes, by their names.

    A source is the image of the file that has most of its last parts (folders and name) in common with it, if
    that is one only; letter case counts where it has to.

    Args:
        file: of a dataset, in COCO's format.
        sources: the images.
        class_names: of the model.

    Raises:
        AnnotationError: it is no such file, or has none of the images, or none of the classes.
        FileNotFoundError: it is not there.
    """
    try:
        content = json.loads(read_text(file))
        entries = [
            # LVIS has URLs only.
            (str(each.get("file_name") or each.get("coco_url") or each["file_name"]), _id(each["id"]))
            for each in content["images"]
        ]
        categories = [(_id(each["id"]), str(each["name"])) for each in content["categories"]]
        used = {each.get("category_id") for each in content.get("annotations", [])}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise AnnotationError(
            f"{file}: not a dataset in COCO's format, with images, their ids and file names, and categories "
            f"({type(error).__name__}: {error})"
        ) from error
    known = dict(entries)
    found = _matched(sources, list(known))
    left_out = [source for source in sources if source not in found]
    shared = _shared_names(left_out, sources, known)
    if not found and shared:
        raise AnnotationError(
            f"{file}: several sources are called {_some(shared)}, and it does not say in which folder its "
            "own is; pass the images of one folder"
        )
    if not found:
        raise AnnotationError(
            f"{file}: has none of the images by name: it has {_some(list(known))}; "
            f"the sources are {_some(sources)}"
        )
    ids, notes = _category_ids(file, categories, used, class_names)
    if twice := sorted({name for name, number in entries if known[name] != number}):
        what = "file names stand" if len(twice) > 1 else "file name stands"
        notes.append(
            f"{len(twice)} {what} twice in {file}, with different ids: {_some(twice)}; "
            "the results have the last"
        )
    missed = sorted(known.keys() - found.values())
    if left_out:
        what = f"{len(left_out)} of {len(sources)} images are not in {file}, or not under one name alone"
        why = f" (several sources are called {_some(shared)})" if shared else ""
        notes.append(f"{what}{why}; the results leave them out: {_some(left_out)}")
    if missed:
        what = f"{len(missed)} of {len(known)} images of {file} are not among the sources"
        notes.append(f"{what}; to be scored, their objects count as missed: {_some(missed)}")
    images = {source: known[name] for source, name in found.items()}
    return CocoIds(f"image ids are those of {file}", images, categories=ids, notes=tuple(notes), frames=False)


def _id(value: object) -> int | str:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"an id is a number or a text; got {value!r}")
    return value


def _category_ids(
    file: Path, categories: list[tuple[int | str, str]], used: set[object], class_names: Sequence[str]
) -> tuple[tuple[int, ...], list[str]]:
    """The id of each class of the model, and what does not fit."""
    by_name: dict[str, int | str] = {}
    for number, name in sorted(categories, key=lambda each: each[0] not in used):  # what is used comes first
        by_name.setdefault(name, number)
    named = _same_names(class_names, list(by_name))
    unknown = [name for name in class_names if name not in named]
    if len(unknown) == len(class_names):
        raise AnnotationError(
            f"{file}: has none of the model's classes: it has {_some([name for _, name in categories])}; "
            f"the model knows {_some(class_names)}"
        )
    ids = {
        name: as_number
        for name, theirs in named.items()
        if (as_number := _number(by_name[theirs])) is not None
    }
    if text := [by_name[theirs] for name, theirs in named.items() if name not in ids]:
        raise AnnotationError(
            f"{file}: its category ids are text ({text[0]!r}), and those of COCO results are numbers; "
            "number its categories"
        )
    notes = []
    if as_text := [number for number in by_name.values() if isinstance(number, str)]:
        notes.append(
            f"the category ids of {file} are text ({as_text[0]!r}); the results have them as numbers"
        )
    if spelled := [f"{name} ({theirs})" for name, theirs in named.items() if name != theirs]:
        notes.append(f"classes that {file} writes in other letter case are the model's: {_some(spelled)}")
    free = max([0, *(_number(each) or 0 for each in by_name.values())]) + 1
    if unknown:
        notes.append(f"{file} does not have the classes {_some(unknown)}; they have ids from {free} on")
    if foreign := sorted(by_name.keys() - set(named.values())):
        notes.append(f"the model does not know {_some(foreign)} of {file}, and finds none of them")
    ids |= {name: free + i for i, name in enumerate(unknown)}
    return tuple(ids[name] for name in class_names), notes


def _number(value: int | str) -> int | None:
    if isinstance(value, int):
        return value
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else None


def _same_names(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Their name of each class of ours that they have; in other letter case where that fits one alone."""
    ours, theirs = list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))
    alike = Counter(name.casefold() for name in ours)
    fitting = defaultdict(list)
    for name in theirs:
        fitting[name.casefold()].append(name)
    same = {}
    for name in ours:
        others = fitting[name.casefold()]
        if name in others:
            same[name] = name
        elif alike[name.casefold()] == len(others) == 1:
            same[name] = others[0]
    return same


def _shared_names(left_out: Sequence[str], sources: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names without folders that several sources have, of those left out though the file has the name."""
    last = {source: _last(source) for source in dict.fromkeys(sources)}
    count = Counter(last.values())
    theirs = {_last(name) for name in names}
    return sorted({last[each] for each in left_out if count[last[each]] > 1 and last[each] in theirs})


def _last(name: str) -> str:
    return loose((_parts(name) or [""])[-1])


def _matched(sources: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The name of each source that has one to itself."""
    by_last: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for name in names:
        parts = _parts(name)
        by_last[loose(parts[-1]) if parts else ""].append((name, parts))
    claims: dict[str, list[tuple[tuple[int, int], str]]] = defaultdict(list)
    for source in dict.fromkeys(sources):
        parts = _parts(source if "://" in source else os.path.abspath(source))
        near = by_last.get(loose(parts[-1]), []) if parts else []
        rated = sorted(((_in_common(parts, others), name) for name, others in near), reverse=True)
        if len(rated) == 1 or (rated and rated[0][0] > rated[1][0]):
            claims[rated[0][1]].append((rated[0][0], source))
    found = {}
    for name, rivals in claims.items():
        rivals.sort(reverse=True)
        if len(rivals) == 1 or rivals[0][0] > rivals[1][0]:
            found[rivals[0][1]] = name
    return found


def _parts(name: str) -> list[str]:
    return [part for part in named_parts(written_parts(name)) if part]


def _in_common(parts: list[str], others: list[str]) -> tuple[int, int]:
    """How many of the last parts are the same, and how many of those are spelled so."""
    pairs = list(zip(reversed(parts), reversed(others), strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if loose(a) != loose(b)), len(pairs))
    return same, sum(a == b for a, b in pairs[:same])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
