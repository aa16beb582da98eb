"""What a file is, by its first bytes: for images and weights that turn out to be something else."""

import codecs
import re
from functools import cache
from typing import NamedTuple

HEAD = 512
"""Bytes of a file's start by which it is told."""

_CHECKPOINT = "pass a checkpoint (.safetensors, .pt) or an exported file"
_IMAGE = "pass an image file, such as a JPEG or PNG"


class Kind(NamedTuple):
    """A kind of file."""

    name: str
    """With its article, as in "a HEIC photo"."""
    as_image: str = _IMAGE
    """What to do where an image was wanted; empty for an image of a format that is read."""
    as_weights: str = _CHECKPOINT
    """What to do where weights were wanted; empty for a file that may hold weights."""

    @property
    def is_film(self) -> bool:
        """Whether it is a video."""
        return self.as_image == _FRAMES


def identify(head: bytes) -> Kind | None:
    """What a file is, where its beginning says so.

    Args:
        head: the first `HEAD` bytes, or all if there are fewer.

    Returns:
        None for an empty file and for what has no known signature.

    >>> identify(bytes.fromhex("ffd8ffe0")).name
    'a JPEG image'
    >>> identify(b"%PDF-1.7").as_image
    'save its pages as PNG or JPEG, as by: pdftoppm -png -r 150 FILE page'
    """
    for pattern, kind in _signatures():
        if pattern.match(head):
            return kind
    if not _is_text(head):
        return None
    return _PATH if re.fullmatch(rb"[^\n]*\.\w{2,5}", head) else _TEXT


def _is_text(head: bytes) -> bool:
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:  # step by step, as the head may end within a letter
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return len(text) > 0 and all(letter.isprintable() or letter.isspace() for letter in text)


# --- The table --------------------------------------------------------------------------------------------

_CONVERT = "convert it to JPEG or PNG"
_FROM_ITS_PROGRAM = "save it as PNG or JPEG in the program that made it"
DEVELOP = "develop it to JPEG or TIFF first, in darktable or the program of the camera's maker"
_UNCRUSH = "convert it back, as by: pngcrush -revert-iphone-optimizations FILE photo.png"
_FRAMES = (
    "detector.stream(...) and ssd detect take films; "
    "or take pictures out of it, as by: ffmpeg -i FILE frame-%06d.jpg"
)
_TO_8_BITS = "scale its values to 8 bits and save it as PNG"
_UNPACK = "unpack it, and pass what is in it"
_FETCH_LFS = "fetch the file that it stands for, within its repository: git lfs pull"
_FETCH_ANNEX = "fetch the file that it stands for, within its repository: git annex get FILE"
_FETCH_DVC = "fetch the file that it stands for, within its repository: dvc pull"
_LOOK = "look into it with an editor; a server may have sent a page of login or error in place of the file"
_GET_AGAIN = "get it again, or copy it again; a copy or download that did not end can look so"
_FOLLOW = "pass the file that it leads to"
_OF_ANOTHER = "weights for another program; " + _IMAGE
_NOT_OURS = "it does not fit this network; " + _CHECKPOINT
_TEXT = Kind("a text file")
_PATH = Kind("a text file", f"{_IMAGE}; a path is a str or a Path, not bytes")

HEIC = Kind("a HEIC photo", f"pip install pillow-heif, and it is read; or {_CONVERT}")
HEIF = Kind("a HEIF image", HEIC.as_image)
HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))


def _media(brands: str) -> str:
    """The pattern of an ISO media file of one of these brands, be it the first or the general kind's next."""
    return rf"\0...ftyp(?:(?:mif1|msf1|miaf|MiHE)....(?:....){{0,9}}?)?(?:{brands})"


_TABLE: list[tuple[str, Kind]] = [
    # Images that are read; raw photos first, as some of them have the header of a TIFF.
    (r"II\*\0....CR|\0...ftypcrx |II\x1A\0\0\0HEAPCCDR", Kind("a raw photo (Canon)", DEVELOP)),
    (r"IIRO|IIRS|MMOR", Kind("a raw photo (ORF)", DEVELOP)),
    (r"IIU\0", Kind("a raw photo (RW2)", DEVELOP)),
    (r"FUJIFILMCCD-RAW", Kind("a raw photo (RAF)", DEVELOP)),
    (r"FOVb", Kind("a raw photo (X3F)", DEVELOP)),
    (r"\0MRM", Kind("a raw photo (MRW)", DEVELOP)),
    (r"\xFF\xD8\xFF\xF7", Kind("a JPEG-LS image", _CONVERT)),
    (r"\xFF\xD8\xFF", Kind("a JPEG image", "")),
    (r"\x89PNG\r\n\x1A\n\0\0\0\x04CgBI", Kind("a PNG image as Xcode packs it", _UNCRUSH)),
    (r"\x89PNG\r\n\x1A\n", Kind("a PNG image", "")),
    (r"RIFF....WEBP", Kind("a WebP image", "")),
    (r"GIF8[79]a", Kind("a GIF image", "")),
    (r"BM....\0\0\0\0", Kind("a BMP image", "")),
    (r"II[*+]\0|MM\0[*+]", Kind("a TIFF image", "")),
    (r"P[1-6]\s", Kind("a NetPBM image", "")),
    (_media("avif|avis"), Kind("an AVIF image", "")),
    # Images that are not.
    (_media("hei[cxms]|hev[cxms]"), HEIC),
    (r"\0...ftyp(?:mif1|msf1|miaf)", HEIF),
    (
        r"\xFF\x0A|\0\0\0\x0CJXL \r\n\x87\n",
        Kind("a JPEG XL image", f"{_CONVERT}, as by: djxl FILE photo.png"),
    ),
    (r"\xFF\x4F\xFF\x51|\0\0\0\x0CjP  \r\n\x87\n", Kind("a JPEG 2000 image", _CONVERT)),
    (r"II\xBC\x01", Kind("a JPEG XR image", _CONVERT)),
    (r"BPG\xFB", Kind("a BPG image", _CONVERT)),
    (r"qoif", Kind("a QOI image", _CONVERT)),
    (r"8BPS", Kind("a Photoshop document", _FROM_ITS_PROGRAM)),
    (r"gimp xcf", Kind("a GIMP document", _FROM_ITS_PROGRAM)),
    (r"%!PS|\xC5\xD0\xD3\xC6", Kind("a PostScript file (EPS, PS)", f"{_CONVERT}; it is never run here")),
    (
        r"(?:\xEF\xBB\xBF)?\s*%PDF-",
        Kind("a PDF", "save its pages as PNG or JPEG, as by: pdftoppm -png -r 150 FILE page"),
    ),
    (
        r"AT&TFORM",
        Kind("a DjVu document", "save its pages as PNG or JPEG, as by: ddjvu -format=tiff FILE page.tif"),
    ),
    (
        r"(?:\xEF\xBB\xBF)?\s*(?:<\?xml.*|<!--.*|<!DOCTYPE svg.*)?<svg",
        Kind("an SVG drawing", f"{_CONVERT}, as by: rsvg-convert FILE -o picture.png"),
    ),
    (r"\0\0\x01\0[\x01-\xFF]\0|icns", Kind("an icon", _CONVERT)),
    (r"DDS ", Kind("a DDS texture", _CONVERT)),
    (r"P7\n", Kind("a PAM image", _CONVERT)),
    (r"PF\n", Kind("a PFM image", _TO_8_BITS)),
    (r"\x76\x2F\x31\x01", Kind("an OpenEXR image", _TO_8_BITS)),
    (r"#\?RADIANCE|#\?RGBE", Kind("a Radiance HDR image", _TO_8_BITS)),
    (r"SIMPLE  =", Kind("a FITS image", _TO_8_BITS)),
    (
        r".{128}DICM",
        Kind("a DICOM file", "save the picture in it as PNG, in a window of grey values that suits it"),
    ),
    (
        r"NRRD000|.{344}n[+i]1\0",
        Kind(
            "a volume of slices (NRRD, NIfTI)",
            "save its slices as PNG, in a window of grey values that suits them",
        ),
    ),
    # Videos and sound.
    (r"\0...ftyp(?:M4A|M4B)", Kind("a sound file")),
    (r"\0...(?:ftyp|moov|mdat|wide|free|skip|pnot)", Kind("a video (MP4, MOV)", _FRAMES)),
    (r"RIFF....AVI ", Kind("a video (AVI)", _FRAMES)),
    (r"\x1A\x45\xDF\xA3", Kind("a video (MKV, WebM)", _FRAMES)),
    (r"\0\0\x01[\xBA\xB3]|(?=.*[\0-\x08])(?:....)?G.{187,191}G.{187,191}G", Kind("a video (MPEG)", _FRAMES)),
    (r"FLV\x01|\x30\x26\xB2\x75\x8E\x66\xCF\x11", Kind("a video (FLV, WMV)", _FRAMES)),
    (r"RIFF....WAVE|ID3|fLaC|OggS", Kind("a sound file")),
    # Weights: torch's zip and legacy file, safetensors, ONNX; then those of others.
    (
        r"PK\x03\x04.{26}[^/]{1,80}/(?:data\.pkl|\S{1,60}?FB.\0Z)",
        Kind("a file of torch", _OF_ANOTHER, ""),
    ),
    (r"\x80\x02\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19", Kind("a file of torch", _OF_ANOTHER, "")),
    (r"......\0\0\{\s*\"", Kind("a safetensors file", _OF_ANOTHER, "")),
    (r"\x08[\x01-\x1F]\x12[\x01-\x3F][ -~]+[\x1A\x22\x2A\x3A\x42]", Kind("an ONNX model", _OF_ANOTHER, "")),
    (r"....TFL3", Kind("a TensorFlow Lite model", _OF_ANOTHER, _NOT_OURS)),
    (r"GGUF", Kind("a GGUF model", _OF_ANOTHER, _NOT_OURS)),
    # Arrays and tables.
    (r"\x93NUMPY", Kind("a NumPy array", "pass the array: numpy.load(FILE)")),
    (
        r"PK\x03\x04.{26}[^/]{1,80}\.npy",
        Kind("a NumPy archive", "pass one of its arrays: numpy.load(FILE)[NAME]", _NOT_OURS),
    ),
    (
        r"MATLAB 7\.3 MAT-file|\x89HDF\r\n\x1A\n",
        Kind("an HDF5 file", "pass an array of it, read with h5py", _NOT_OURS),
    ),
    (r"MATLAB [45]\.\d MAT-file", Kind("a MATLAB file", "pass an array of it: scipy.io.loadmat(FILE)[NAME]")),
    (
        r"PAR1|ARROW1|Obj\x01",
        Kind("a table (Parquet, Arrow, Avro)", "read the images in it, and pass their bytes"),
    ),
    (r"SQLite format 3\0", Kind("an SQLite database")),
    (
        r"\x80[\x02-\x05][\x95}(\]cX\x8A\x8C]",
        Kind("a pickle of Python", "pass the array or image that it holds", ""),
    ),
    # Archives.
    (
        r"PK\x03\x04.{26}(?:\[Content_Types\]\.xml|mimetype)|\xD0\xCF\x11\xE0\xA1\xB1\x1A\xE1|\{\\rtf",
        Kind("an office document", "save its pictures as PNG or JPEG"),
    ),
    (r"PK[\x03\x05\x07][\x04\x06\x08]", Kind("a zip archive", _UNPACK, _UNPACK)),
    (r".{257}ustar", Kind("a tar archive", _UNPACK, _UNPACK)),
    (r"\x1F\x8B", Kind("a gzip archive", _UNPACK, _UNPACK)),
    (r"BZh[1-9]", Kind("a bzip2 archive", _UNPACK, _UNPACK)),
    (r"\xFD7zXZ\0", Kind("an xz archive", _UNPACK, _UNPACK)),
    (r"\x28\xB5\x2F\xFD", Kind("a Zstandard archive", _UNPACK, _UNPACK)),
    (r"7z\xBC\xAF\x27\x1C", Kind("a 7z archive", _UNPACK, _UNPACK)),
    (r"Rar!\x1A\x07", Kind("a RAR archive", _UNPACK, _UNPACK)),
    # What stands in for another file.
    (r"version https?://(?:git-lfs|hawser)\.github\.com", Kind("a Git LFS pointer", _FETCH_LFS, _FETCH_LFS)),
    (r"(?:\.\./)*/?(?:\.git)?/annex/objects/", Kind("a git-annex pointer", _FETCH_ANNEX, _FETCH_ANNEX)),
    (r"outs:\s+- (?:md5|hash):", Kind("a DVC pointer", _FETCH_DVC, _FETCH_DVC)),
    (
        r"\0\x05\x16[\0\x07]",
        Kind(
            "a side file of macOS (AppleDouble)",
            "pass the file beside it, without ._ before its name",
            "pass the file beside it, without ._ before its name",
        ),
    ),
    (
        r"L\0\0\0\x01\x14\x02\0|book\0\0\0\0mark|\[InternetShortcut\]|\[Desktop Entry\]",
        Kind("a shortcut", _FOLLOW, _FOLLOW),
    ),
    (
        r"bplist00",
        Kind(
            "a property list of macOS, as files in iCloud have in their place",
            "download the file itself in Finder",
            "download the file itself in Finder",
        ),
    ),
    (r"\0+\Z", Kind("a file that begins with nothing but zeros", _GET_AGAIN, _GET_AGAIN)),
    # Text and programs.
    (
        r"data:image/|/9j/4|iVBORw0KGgo",
        Kind("an image as base64 text", "decode it, and pass the bytes: base64.b64decode(TEXT)"),
    ),
    (
        r"(?:\xEF\xBB\xBF)?\s*<\?xml[^>]*>\s*<net ",
        Kind("an OpenVINO model", _OF_ANOTHER, "pass the folder that it is in"),
    ),
    (r"(?:\xEF\xBB\xBF|\xFF\xFE)?\s*<\0?[!?\w]", Kind("a web page or other markup", _LOOK, _LOOK)),
    (r"(?:\xEF\xBB\xBF)?\s*[\[{]\s*[\[{\"\d-]", Kind("JSON text", _LOOK, _LOOK)),
    (r"\x7FELF|\xCF\xFA\xED\xFE|\xCA\xFE\xBA\xBE|MZ.{58}..\0\0", Kind("a program")),
]


@cache  # they are compiled when a file is asked for, not at import
def _signatures() -> list[tuple[re.Pattern[bytes], Kind]]:
    return [(re.compile(pattern.encode("latin-1"), re.DOTALL), kind) for pattern, kind in _TABLE]
