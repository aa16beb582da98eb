"""The images in the body of a request: a form, JSON, or one image as it is."""

import base64
import json
import re
from collections.abc import Callable
from itertools import islice
from typing import TypeAlias

from ssd.errors import MissingExtra, as_line
from ssd.web import is_web_url

try:
    from python_multipart import MultipartParser
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import parse_options_header
except ImportError as error:
    raise MissingExtra("serve") from error

Images: TypeAlias = list[tuple[str, bytes | str]]
"""Name and content of each, or its URL."""

TOLD = 200  # letters of a name that a stranger gives an image
_AS_JSON = 'JSON has to be as {"images": [{"name": "a.jpg", "data": "BASE64"}]}'


def images_of(content_type: str, body: bytes, *, most: int, allow_urls: bool = False) -> Images:
    """The images of a request.

    Args:
        content_type: the header. What is neither a form of files nor JSON is one image, whatever it calls
            itself: ``curl --data-binary`` says that it were another kind of form.
        body: all of it.
        most: images of a request.
        allow_urls: whether they may be given by URL.

    Raises:
        ValueError: the body is not as its kind has to be, or has no image, or too many.

    >>> images_of("image/jpeg", b"...", most=1)
    [('image 0', b'...')]
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        images = _of_form(body, options.get(b"boundary", b""), most)
    elif kind == b"application/json":
        images = _of_json(body, most, allow_urls)
    else:
        images = [("image 0", body)]
    if not images:
        raise ValueError("no image in the request")
    return images


def _name(given: object, number: int) -> str:
    return as_line(str(given), TOLD) if given else f"image {number}"


def _require_few(number: int, most: int) -> None:
    if number >= most:
        raise ValueError(f"more images than the {most} that a request may have")


def _of_form(body: bytes, boundary: bytes, most: int) -> Images:
    images: Images = []
    header: dict[str, bytes] = {}
    disposition: dict[bytes, bytes] = {}
    content = bytearray()

    def begin() -> None:
        _require_few(len(images), most)
        disposition.clear()
        header.update(name=b"", value=b"")

    def adds(part: str) -> Callable[[bytes, int, int], None]:
        def add(data: bytes, start: int, end: int) -> None:
            header[part] += data[start:end]

        return add

    def end_header() -> None:
        if header["name"].lower() == b"content-disposition":
            disposition.update(parse_options_header(header["value"].decode("latin-1"))[1])
        header.update(name=b"", value=b"")

    def end() -> None:
        if b"filename" not in disposition:
            field = as_line(disposition.get(b"name", b"").decode(errors="replace"), TOLD)
            raise ValueError(f"{field}: a form has files alone; options are in the query")
        name = disposition[b"filename"].decode("utf-8", "replace")
        images.append((_name(name, len(images)), bytes(content)))
        content.clear()

    ended: list[bool] = []
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": adds("name"),
                "on_header_value": adds("value"),
                "on_header_end": end_header,
                "on_part_data": lambda data, start, stop: content.extend(memoryview(data)[start:stop]),
                "on_part_end": end,
                "on_end": lambda: ended.append(True),
            },
        )
        parser.write(body)
    except FormParserError as error:
        raise ValueError(f"the form cannot be read ({as_line(str(error), TOLD)})") from error
    if not ended:
        raise ValueError("the form cannot be read (its last boundary is missing)")
    return images


def _of_json(body: bytes, most: int, allow_urls: bool) -> Images:
    try:
        entries = [dict(each) for each in islice(json.loads(body)["images"], most + 1)]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(_AS_JSON) from error
    images: Images = []
    for number, entry in enumerate(entries):
        _require_few(number, most)
        url, data, name = (entry.pop(key, None) for key in ("url", "data", "name"))
        name = _name(name or url, number)
        if entry or (url is None) == (data is None):
            raise ValueError(f"{name}: an image has either data or url, and may have a name; nothing else")
        images.append((name, _of_base64(name, data) if url is None else _allowed(url, allow_urls)))
    return images


def _of_base64(name: str, data: object) -> bytes:
    try:
        if not isinstance(data, str):
            raise ValueError("it is no text")
        return base64.b64decode(re.sub(r"^data:[^,]{0,200},|\s+", "", data), validate=True)
    except ValueError as error:
        raise ValueError(f"{name}: its data is not base64 ({error})") from error


def _allowed(url: object, allow_urls: bool) -> str:
    if not allow_urls:
        raise ValueError("images by URL are not fetched here; ssd serve --allow-urls does")
    if not isinstance(url, str) or not is_web_url(url):
        raise ValueError(f"{as_line(str(url), TOLD)}: only http and https URLs are fetched")
    return url
