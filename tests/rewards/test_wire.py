import base64
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from mixgrpo_jax.rewards.serving import wire

LIMITS = wire.Limits(images=4, bytes=10_000)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3)).astype(np.uint8)
METADATA = [{"number": "42", "plate_rgb": np.uint8([1, 2, 3]), "weight": np.float32(0.5)}, {}, {}]
REQUEST = wire.Request("one", ("ocr",), IMAGES, ["a", "ü", ""], METADATA)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def npy(image):
    file = io.BytesIO()
    np.save(file, image)
    return base64.b64encode(file.getvalue()).decode()


def as_json(**changes):
    return json.dumps({"images": [png(image) for image in IMAGES], "prompts": ["a"] * 3} | changes).encode()


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_an_archive_gives_the_request_back():
    decoded = wire.decode(wire.encode(REQUEST), wire.ARCHIVE, LIMITS)
    np.testing.assert_array_equal(decoded.images, IMAGES)
    assert (decoded.id, decoded.rewards, decoded.prompts) == ("one", ("ocr",), ["a", "ü", ""])
    assert decoded.metadata[0] == {"number": "42", "plate_rgb": [1, 2, 3], "weight": 0.5}
    assert decoded.digest() == REQUEST.digest()


@pytest.mark.parametrize("write", [png, npy])
def test_json_holds_png_and_npy(write):
    body = as_json(images=[write(image) for image in IMAGES])
    decoded = wire.decode(body, "application/json; charset=utf-8", LIMITS)
    np.testing.assert_array_equal(decoded.images, IMAGES)
    assert decoded.metadata == [{}] * 3 and decoded.rewards == () and len(decoded.id) == 32


def test_the_digest_is_of_all_but_the_id():
    def digest(**changes):
        return wire.Request(**(vars(REQUEST) | changes)).digest()

    assert digest(id="two") == REQUEST.digest()
    for change in ({"rewards": ()}, {"images": IMAGES + 1}, {"prompts": ["b", "ü", ""]}, {"metadata": [{}] * 3}):
        assert digest(**change) != REQUEST.digest()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "body"),
        (b"\xff", "body"),
        (b"[" * 100_000, "body"),
        (b"[]", "images"),
        (as_json(images="x"), "images"),
        (as_json(images=[]), "images"),
        (as_json(images=["x"] * 3), "images[0]"),
        (as_json(images=[5] * 3), "images[0]"),
        (as_json(images=[png(IMAGES[0]), png(IMAGES[0])[:40]]), "images[1]"),
        (as_json(images=[png(IMAGES[0]), png(IMAGES[0][:4])]), "images[1]"),
        (as_json(images=[npy(IMAGES[0].astype(float))] * 3), "images"),
        (as_json(images=[npy(np.array([object()]))]), "images[0]"),
        (as_json(prompts=None), "prompts"),
        (as_json(prompts=["a"]), "prompts"),
        (as_json(prompts=["a", 1, "b"]), "prompts[1]"),
        (as_json(metadata=[{}, {}]), "metadata"),
        (as_json(metadata=[{}, {}, "x"]), "metadata[2]"),
        (as_json(rewards="ocr"), "rewards"),
        (as_json(id=7), "id"),
        (as_json(id="x" * 129), "id"),
        (as_json(id="\ud83d"), "id"),
        (as_json(promts=[]), "promts"),
    ],
)
def test_bad_json_names_the_field(body, field):
    with pytest.raises(wire.BadRequest) as error:
        wire.decode(body, wire.JSON, LIMITS)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"PK\x03\x04 no zip", "body"),
        (wire.encode(REQUEST)[:-30], "body"),
        (archive(images=IMAGES), "request"),
        (archive(request="{}"), "images"),
        (archive(images=IMAGES, request="{"), "request"),
        (archive(images=IMAGES, request="5"), "request"),
        (archive(images=IMAGES, request="{}"), "prompts"),
        (archive(images=IMAGES.astype(np.int32), request="{}"), "images"),
        (archive(images=IMAGES[..., :2], request="{}"), "images"),
        (archive(images=IMAGES[:0], request="{}"), "images"),
        (archive(images=np.array([object()]), request="{}"), "body"),  # a pickle
    ],
)
def test_a_bad_archive_names_the_field(body, field):
    with pytest.raises(wire.BadRequest) as error:
        wire.decode(body, wire.ARCHIVE, LIMITS)
    assert error.value.field == field


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (8, 129), (4097, 300)])
def test_pictures_that_readers_of_text_would_blow_up_are_refused(shape):
    image, limits = np.zeros((*shape, 3), np.uint8), wire.Limits(images=4, bytes=1 << 30)
    for body, kind, field in (
        (archive(images=image[None], request='{"prompts": ["a"]}'), wire.ARCHIVE, "images"),
        (as_json(images=[png(image)], prompts=["a"]), wire.JSON, "images[0]"),
        (as_json(images=[npy(image)], prompts=["a"]), wire.JSON, "images"),
    ):
        with pytest.raises(wire.BadRequest, match=f"{shape[0]}x{shape[1]}; no side may be over 4096") as error:
            wire.decode(body, kind, limits)
        assert error.value.field == field


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f4", "<i8", "?", "U7"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_headers_of_arrays_are_read_as_numpy_writes_them(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for given in (array, np.asfortranarray(array)):
        for version in ((1, 0), (2, 0), (3, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, given, version)
            read = wire._array(file.getvalue())
            np.testing.assert_array_equal(read, given)
            assert read.dtype == given.dtype
    for bad in (file.getvalue()[:-1], file.getvalue() + b"x", file.getvalue()[:60], b""):
        with pytest.raises(ValueError, match="an array that cannot be read"):
            wire._array(bad)


def test_headers_are_not_read_as_python(monkeypatch):
    """Python's parser is shared by threads, and once in thousands of calls it fails for one of them."""
    monkeypatch.delattr("ast.literal_eval")
    np.testing.assert_array_equal(wire.decode(wire.encode(REQUEST), wire.ARCHIVE, LIMITS).images, IMAGES)
    wire.decode(as_json(images=[npy(image) for image in IMAGES]), wire.JSON, LIMITS)


def locked():
    body = bytearray(wire.encode(REQUEST))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = body.find(signature)
        while at >= 0:
            body[at + flags] |= 1
            at = body.find(signature, at + 4)
    return bytes(body)


def test_an_archive_with_a_password_is_bad():
    with pytest.raises(wire.BadRequest, match=r"no .npz archive.*encrypted"):
        wire.decode(locked(), wire.ARCHIVE, LIMITS)


def test_other_types_are_refused():
    with pytest.raises(wire.BadRequest, match="Content-Type"):
        wire.decode(b"", "application/x-pickle", LIMITS)


def test_limits_hold_before_anything_is_unpacked():
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", bytes(1_000_000))
    large = png(np.zeros((100, 100, 3), np.uint8))  # small as a file
    for body, kind in (
        (bomb.getvalue(), wire.ARCHIVE),
        (as_json(images=[large]), wire.JSON),
        (as_json(images=[png(IMAGES[0])] * 5), wire.JSON),
        (archive(images=np.repeat(IMAGES[:1], 5, 0), request="{}"), wire.ARCHIVE),
    ):
        with pytest.raises(wire.TooLarge, match="limit"):
            wire.decode(body, kind, LIMITS)


def test_metadata_that_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match="metadata"):
        wire.encode(wire.Request("", (), IMAGES, ["a"] * 3, [{"x": object()}, {}, {}]))
