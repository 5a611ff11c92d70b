"""What a reward server is asked, and how that is written: as an .npz archive, or as JSON. Never as a pickle.

An archive holds `images`, uint8 [B, H, W, 3], and `request`, a string of JSON:

    {"id": "...", "rewards": ["ocr"], "prompts": ["..."] * B, "metadata": [{...}] * B}

Plain JSON is the same object with `images`: for each one, the base64 of a PNG or of a .npy of uint8 [H, W, 3].
`id`, `rewards` (all that the server has) and `metadata` (empty) may be left out.
"""

import base64
import hashlib
import io
import json
import lzma
import math
import re
import uuid
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

ARCHIVE, JSON = "application/octet-stream", "application/json"
FIELDS = ("id", "rewards", "prompts", "metadata")
PNG = b"\x89PNG"
ARRAY = re.compile(  # what precedes the numbers of a .npy, as NumPy writes it: versions 1.0, 2.0 and 3.0
    rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)"
    rb"\{'descr': '([<>|][a-zA-Z]\d{1,7})', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,9}, ?)*(?:\d{1,9})?)\), \} *\n",
    re.DOTALL,
)


class BadRequest(ValueError):
    """A request that cannot be read; `field` says where."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class TooLarge(ValueError):
    """A request over a server's limits."""


@dataclass(frozen=True)
class Limits:
    """What a server takes in one request."""

    images: int
    bytes: int  # of the body, and of the images once they are decoded
    side: int = 4096  # pixels of a picture's longer side
    aspect: int = 16  # how many times its shorter side that may be: readers of text scale by it
    seconds: float = 60.0  # in which the whole body has to come


@dataclass(frozen=True)
class Request:
    """Images to score: uint8 [B, H, W, 3], and B prompts with their metadata; no `rewards` asks for all there are."""

    id: str
    rewards: tuple[str, ...]
    images: np.ndarray
    prompts: list[str]
    metadata: list[dict]

    def digest(self) -> bytes:
        """A fingerprint of all but the id: another request by the same id has another one."""
        said = json.dumps([self.rewards, self.prompts, self.metadata, self.images.shape], default=_plain)
        fingerprint = hashlib.sha256(said.encode())
        fingerprint.update(np.ascontiguousarray(self.images).data)
        return fingerprint.digest()


def encode(request: Request) -> bytes:
    """The request as an archive; arrays in the metadata become lists.

    Raises:
        ValueError: metadata that JSON cannot hold.
    """
    head = {name: getattr(request, name) for name in FIELDS}
    try:
        text = json.dumps(head, default=_plain)
    except TypeError as error:
        raise ValueError(
            f"metadata cannot be sent to a reward server: {error}; keep numbers, text and arrays"
        ) from None
    archive = io.BytesIO()
    np.savez(archive, images=request.images, request=np.array(text))
    return archive.getvalue()


def decode(body: bytes, content_type: str, limits: Limits) -> Request:
    """The request in a body of type `ARCHIVE` or `JSON`.

    Raises:
        BadRequest: it cannot be read; the error names the field.
        TooLarge: more images, or more bytes of them, than `limits` allow.
    """
    kinds = {ARCHIVE: _decode_archive, JSON: _decode_json}
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in kinds:
        raise BadRequest("Content-Type", f"{content_type!r} is unknown; send {ARCHIVE} (.npz) or {JSON}")
    head, images = kinds[kind](body, limits)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise BadRequest("images", f"they are {images.dtype} {list(images.shape)}; send uint8 [B, H, W, 3]")
    _within(len(images), limits)
    _check_sides("images", images.shape[1], images.shape[2], limits)
    return _request(head, images)


def _decode_archive(body: bytes, limits: Limits) -> tuple[Any, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > limits.bytes:
                raise TooLarge(f"the archive unpacks to {size} bytes; the limit is {limits.bytes}")
            if missing := {"images.npy", "request.npy"} - set(archive.namelist()):
                raise BadRequest(min(missing).removesuffix(".npy"), "is missing from the archive")
            arrays = {name: _array(archive.read(f"{name}.npy")) for name in ("images", "request")}
    except (TooLarge, BadRequest):
        raise
    # What zipfile raises: of what it cannot unpack, RuntimeError for a password, and whatever decompressors raise.
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        MemoryError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        raise BadRequest("body", f"is no .npz archive: {error}") from None
    return _load_json(str(arrays["request"]), "request"), arrays["images"]


def _array(data: bytes) -> np.ndarray:
    """The array of a .npy file; ValueError for one that cannot be read, or is no plain array of numbers or text.

    NumPy reads the header as Python, by the compiler of CPython, which is not safe in threads before 3.13.
    """
    head = ARRAY.match(data)
    if head is None:
        raise ValueError("holds an array that cannot be read: write it with numpy.save, of numbers or text")
    kind, fortran, shape = head[1].decode(), head[2] == b"True", tuple(int(n) for n in re.findall(rb"\d+", head[3]))
    dtype = np.dtype(kind)
    if dtype.kind not in "biufU" or len(data) - head.end() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"holds an array that cannot be read: {kind} {list(shape)} in {len(data) - head.end()} bytes")
    return np.frombuffer(data, dtype, offset=head.end()).reshape(shape, order="F" if fortran else "C")


def _decode_json(body: bytes, limits: Limits) -> tuple[Any, np.ndarray]:
    head = _load_json(body, "body")
    images = head.pop("images", None) if isinstance(head, dict) else None
    if not isinstance(images, list) or not images:
        raise BadRequest("images", "send a list of base64 strings, each a PNG or a .npy")
    _within(len(images), limits)
    decoded: list[np.ndarray] = []
    for i, text in enumerate(images):
        room = limits.bytes - sum(image.nbytes for image in decoded)
        decoded.append(_decode_image(f"images[{i}]", text, room, limits))
        if decoded[i].shape != decoded[0].shape:
            raise BadRequest(f"images[{i}]", f"is {decoded[i].shape}, the first one {decoded[0].shape}; send one size")
    return head, np.stack(decoded)


def _decode_image(field: str, text: Any, room: int, limits: Limits) -> np.ndarray:
    """One image of at most `room` bytes; its size is looked at before it is unpacked."""
    try:
        data = base64.b64decode(text, validate=True)
        if data[:4] != PNG:
            return _array(data)
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        _check_sides(field, picture.height, picture.width, limits)
        if 3 * picture.width * picture.height > room:
            raise TooLarge(f"{field} takes the images over the limit of bytes: it is {picture.width}x{picture.height}")
        return np.asarray(picture.convert("RGB"))
    except (TooLarge, BadRequest):
        raise
    except (ValueError, TypeError, OSError, EOFError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise BadRequest(field, f"is neither the base64 of a PNG nor that of a .npy: {error}") from None


def _check_sides(field: str, rows: int, columns: int, limits: Limits) -> None:
    short, long = sorted((rows, columns))
    if long > limits.side or long > limits.aspect * short:
        raise BadRequest(
            field,
            f"a picture of {rows}x{columns}; no side may be over {limits.side} pixels, or over {limits.aspect} times "
            "the other",
        )


def _load_json(text: str | bytes, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(field, f"is no JSON: {error}") from None


def _request(head: Any, images: np.ndarray) -> Request:
    if not isinstance(head, dict):
        raise BadRequest("request", f"is a {type(head).__name__}; send an object with prompts")
    if unknown := set(head) - set(FIELDS):
        raise BadRequest(min(unknown), f"is unknown; the fields are images, {', '.join(FIELDS)}")
    prompts = _list_of(str, "prompts", head.get("prompts"), len(images))
    metadata = _list_of(dict, "metadata", head.get("metadata", [{}] * len(images)), len(images))
    rewards = _list_of(str, "rewards", head.get("rewards", []))
    name = head.get("id") or uuid.uuid4().hex
    if not isinstance(name, str) or len(name) > 128 or not name.isprintable():
        raise BadRequest("id", f"{str(name)[:200]!r} should be a string of at most 128 printable characters")
    return Request(name, tuple(rewards), images, prompts, metadata)


def _list_of(kind: type, field: str, values: Any, length: int | None = None) -> list:
    if not isinstance(values, list):
        raise BadRequest(field, f"is {values!r:.200}; send a list")
    if length is not None and len(values) != length:
        raise BadRequest(field, f"has {len(values)} entries for {length} images")
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise BadRequest(f"{field}[{i}]", f"is a {type(value).__name__}; send a {kind.__name__}")
    return values


def _within(images: int, limits: Limits) -> None:
    if images > limits.images:
        raise TooLarge(f"{images} images; the limit is {limits.images} a request")


def _plain(value: Any) -> Any:
    """What JSON can hold in the place of a NumPy or JAX array or scalar."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} in the metadata")
