"""What a file is that is no image we read: its name, by its first bytes, and what to do with it. Pure."""

import re
import struct

EXPORT = "Export it as JPEG or PNG."
# Of cameras' RAW files; many of them are TIFFs by their first bytes.
RAW_SUFFIXES = frozenset(
    (
        *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw"),
        *(".orf", ".pef", ".raf", ".rw2", ".sr2", ".srf", ".srw", ".x3f"),
    )
)
_CONVERT, _UNPACK = "Convert it to PNG.", "Unpack it."
_FRAMES = "A server answers it at /predict/video; a dataset gets its frames by a source of kind `video`."
_CHECK = "Check where it was downloaded from."
# Place, bytes, name, what to do.
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (8, b"CR\x02\0", "a camera's RAW file (CR2)", EXPORT),
    (4, b"ftypcrx ", "a camera's RAW file (CR3)", EXPORT),
    (0, b"FUJIFILMCCD-RAW", "a camera's RAW file (RAF)", EXPORT),
    (0, b"IIRO", "a camera's RAW file (ORF)", EXPORT),
    (0, b"IIRS", "a camera's RAW file (ORF)", EXPORT),
    (0, b"MMOR", "a camera's RAW file (ORF)", EXPORT),
    (0, b"IIU\0", "a camera's RAW file (RW2)", EXPORT),
    (0, b"FOVb", "a camera's RAW file (X3F)", EXPORT),
    (128, b"DICM", "a DICOM file", "Export its pictures as PNG."),
    (0, b"II*\0", "TIFF", _CONVERT),
    (0, b"MM\0*", "TIFF", _CONVERT),
    (0, b"II+\0", "TIFF", _CONVERT),
    (0, b"MM\0+", "TIFF", _CONVERT),
    (0, b"GIF8", "GIF", _CONVERT),
    (0, b"\0\0\0\x0cjP  \r\n", "JPEG 2000", EXPORT),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000", EXPORT),
    (0, b"\0\0\0\x0cJXL \r\n", "JPEG XL", EXPORT),
    (0, b"\xff\x0a", "JPEG XL", EXPORT),
    (0, b"8BPS", "a Photoshop file", EXPORT),
    (0, b"%PDF", "a PDF", EXPORT),
    (0, b"%!PS", "PostScript", EXPORT),
    (0, b"\0\0\x01\0", "an icon (ICO)", EXPORT),
    (0, b"DDS ", "DDS", EXPORT),
    (0, b"v/1\x01", "OpenEXR", EXPORT),
    (0, b"qoif", "QOI", EXPORT),
    (0, b"SIMPLE  =", "a FITS file", EXPORT),
    (344, b"n+1\0", "a NIfTI file", "Export its pictures as PNG."),
    (0, b"\x89HDF\r\n", "an HDF5 file", "Export its pictures as PNG."),
    (0, b"\x93NUMPY", "an array of NumPy", "Save its pictures as PNG."),
    (0, b"<svg", "a drawing (SVG)", EXPORT),
    (0, b"PK\x03\x04", "a zip", "Its path is a source of images."),
    (0, b"\x1f\x8b", "gzip data", _UNPACK),
    (0, b"BZh", "bzip2 data", _UNPACK),
    (0, b"\xfd7zXZ\0", "xz data", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"PAR1", "a Parquet table", "Its path is a source of images."),
    (0, b"SQLite format 3", "a SQLite database", "Its images come from a source of kind `sql`."),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the image", "Run `git lfs pull`."),
    (0, b"\0\x05\x16\x07", "a side file of macOS (AppleDouble)", "Remove it."),
    (0, b"\x7fELF", "a program", _CHECK),
    (4, b"ftyp", "a film", _FRAMES),
    (0, b"\x1aE\xdf\xa3", "a film (Matroska, WebM)", _FRAMES),
    (8, b"AVI LIST", "a film (AVI)", _FRAMES),
)
_HEAD = 64
# Of the first bytes, without the mark that some editors write before UTF-8.
_PATTERNS = (
    (re.compile(rb"P[1-6f]\s"), "PPM", _CONVERT),
    (
        re.compile(rb"\s*<(!doctype html|!--|html|\?xml|head|error|script)", re.IGNORECASE),
        "a web page or XML, not an image",
        _CHECK,
    ),
    (re.compile(rb"\s*(\{\s*[\"}]|\[\s*[\[{\"\]\d-])"), "JSON text, not an image", _CHECK),
    (
        re.compile(rb"data:image/[\w.+-]+;base64,|/9j/[\w+/]{12}|iVBORw0KGgo[\w+/]{4}"),
        "an image as base64",
        "Decode it.",
    ),
    (re.compile(rb"[\t\r\n\x20-\x7e]+$"), "text, not an image", _CHECK),
    (re.compile(rb"\0+$"), "zero bytes, at least where it begins", "Copy it again: a disk or a download failed."),
)


def name_other(data: bytes) -> tuple[str, str]:
    """Return the name of a format that we do not read, and what to do; two empty texts when it is not known."""
    for place, magic, name, todo in _OTHERS:
        if data.startswith(magic, place):
            return name, todo
    if data[:2] == b"BM" and len(data) > 26 and struct.unpack_from("<I", data, 6)[0] == 0:
        return "BMP", _CONVERT
    head = data[:_HEAD].removeprefix(b"\xef\xbb\xbf")
    for pattern, name, todo in _PATTERNS:
        if pattern.match(head):
            return name, todo
    return "", ""
