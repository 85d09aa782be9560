"""Images in every form in which they come: read rightly, or refused with a sentence."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_openvla import make_oft, make_openvla
from tiny_pi0 import make as make_pi0
from tiny_pi0 import observation

from vla_pruner.models.given.images import check_image
from vla_pruner.models.openvla import processing as openvla
from vla_pruner.models.pi0 import processing as pi0

# A picture no two parts of which are alike: turned, mirrored or with its colours swapped, it shows.
Y, X = np.mgrid[0:40, 0:56]
RGB = np.stack([4 * X, 6 * Y, 255 - 2 * X - 3 * Y], axis=-1).astype(np.uint8)
GREY = np.ascontiguousarray(RGB[..., 0])
GREY3 = np.stack([GREY] * 3, axis=-1)


def pil(array: np.ndarray, mode: str | None = None) -> Image.Image:
    image = Image.fromarray(array)
    return image if mode is None else image.convert(mode)


def reopened(image: Image.Image, format: str = "PNG", **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def opaque(array: np.ndarray) -> np.ndarray:
    return np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])


def paletted() -> tuple[Image.Image, np.ndarray]:
    """An image of 64 colours, by hand: index y // 5 * 8 + x // 7, colour (3 i, 255 - 2 i, i)."""
    index = (Y // 5 * 8 + X // 7).astype(np.uint8)
    image = Image.new("P", (56, 40))
    image.frombytes(index.tobytes())
    image.putpalette([value for i in range(64) for value in (3 * i, 255 - 2 * i, i)])
    i = index.astype(int)
    return image, np.stack([3 * i, 255 - 2 * i, i], axis=-1).astype(np.uint8)


def cmyk() -> tuple[Image.Image, np.ndarray]:
    """Without black, a colour is 255 minus its complement."""
    return Image.merge("CMYK", [*pil(255 - RGB).split(), Image.new("L", (56, 40), 0)]), RGB


RIGHT: dict[str, tuple[Any, np.ndarray]] = {
    "array": (RGB, RGB),
    "RGB": (pil(RGB), RGB),
    "PNG": (reopened(pil(RGB)), RGB),
    "L": (pil(GREY), GREY3),
    "1": (pil(GREY > 128), np.where(GREY3 > 128, 255, 0).astype(np.uint8)),
    "P": paletted(),
    "CMYK": cmyk(),
    "RGBA, opaque": (pil(opaque(RGB)), RGB),
    "LA, opaque": (pil(GREY).convert("LA"), GREY3),
    "RGBX": (pil(RGB).convert("RGBX"), RGB),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), GREY3),
    "I;16 between": (Image.fromarray(GREY.astype(np.uint16) * 257 + 128), GREY3),
    "I;16 PNG": (reopened(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY3),
    "array, opaque": (opaque(RGB), RGB),
    "backwards": (RGB[::-1], RGB[::-1].copy()),
    "mirrored": (RGB[:, ::-1], RGB[:, ::-1].copy()),
    "read-only": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), RGB),
    "fortran": (np.asfortranarray(RGB), RGB),
    "one pixel": (RGB[:1, :1], RGB[:1, :1]),
    "three rows": (RGB[:3], RGB[:3]),
    "three by three": (RGB[:3, :3], RGB[:3, :3]),
    "tensor": (torch.from_numpy(RGB), RGB),
    "tensor, colours in front": (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
    "tensor, opaque": (torch.from_numpy(opaque(RGB)).permute(2, 0, 1).contiguous(), RGB),
}


@pytest.mark.parametrize("form", RIGHT)
def test_what_is_read_is_what_was_meant(form):
    given, expected = RIGHT[form]
    found = check_image(given, "front")
    assert found.dtype == np.uint8 and np.array_equal(found, expected)


def test_other_colour_spaces_come_back_up_to_rounding():
    for mode in ("YCbCr", "HSV"):
        found = check_image(pil(RGB, mode), 0).astype(int)
        assert np.abs(found - RGB).max() <= (3 if mode == "YCbCr" else 8), mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_an_image_is_turned_as_its_camera_was(orientation, format):
    """The eight entries of EXIF, by hand: what rows and columns of the stored image mean."""
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB.transpose(1, 0, 2)[::-1],
        7: RGB.transpose(1, 0, 2)[::-1, ::-1],
        8: RGB.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(pil(np.ascontiguousarray(stored)), format, exif=exif)
    before = image.size
    assert np.array_equal(check_image(image, 0), RGB)
    assert image.size == before, "the caller's image was changed"


transparent = opaque(RGB)
transparent[3, 4, 3] = 254
keyed = paletted()[0]
keyed.info["transparency"] = 5
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), TypeError, "mode 'I'.*range"),
    "F": (Image.fromarray((GREY / 255).astype(np.float32)), TypeError, "mode 'F'.*range"),
    "RGBA": (pil(transparent), ValueError, "transparent"),
    "RGBA, clear": (Image.new("RGBA", (4, 4)), ValueError, "transparent"),
    "LA": (Image.new("LA", (4, 4)), ValueError, "transparent"),
    "P with a key": (keyed, ValueError, "transparent"),
    "empty PIL": (Image.new("RGB", (0, 4)), ValueError, r"shape \(4, 0, 3\)"),
    "array, transparent": (transparent, ValueError, "transparent"),
    "grey": (GREY, ValueError, r"shape \(40, 56\).*np\.stack"),
    "grey, one channel": (GREY[..., None], ValueError, r"shape \(40, 56, 1\)"),
    "two channels": (RGB[..., :2], ValueError, r"shape \(40, 56, 2\)"),
    "colours in front": (RGB.transpose(2, 0, 1), ValueError, "colours are in front.*transpose"),
    "float 0..1": (RGB / 255, TypeError, "dtype float64.*multiply by 255"),
    "float 0..255": (RGB.astype(np.float32), TypeError, "dtype float32"),
    "NaN": (np.full((4, 4, 3), np.nan, np.float32), TypeError, "dtype float32"),
    "half": (RGB.astype(np.float16), TypeError, "dtype float16"),
    "bool": (RGB > 9, TypeError, "dtype bool"),
    "int64": (RGB.astype(np.int64), TypeError, "dtype int64"),
    "int8": (RGB.astype(np.int8), TypeError, "dtype int8"),
    "16-bit": (RGB.astype(np.uint16) * 257, TypeError, "dtype uint16.*divide by 257"),
    "objects": (RGB.astype(object), TypeError, "dtype object"),
    "strings": (RGB.astype(str), TypeError, "dtype <U"),
    "masked": (np.ma.masked_less(RGB, 9), TypeError, "MaskedArray"),
    "no rows": (RGB[:0], ValueError, r"shape \(0, 56, 3\)"),
    "no columns": (RGB[:, :0], ValueError, r"shape \(40, 0, 3\)"),
    "a number": (np.uint8(3), TypeError, "uint8"),
    "no axes": (np.array(3, np.uint8), ValueError, r"shape \(\)"),
    "tensor, float": (torch.rand(3, 4, 5), TypeError, "dtype float32"),
    "tensor, bf16": (torch.rand(3, 4, 5).bfloat16(), TypeError, "dtype bfloat16"),
    "tensor, grey": (torch.from_numpy(GREY), ValueError, r"shape \(40, 56\)"),
    "tensor, either": (torch.from_numpy(RGB[:3]), ValueError, "in front or behind"),
    "tensor, video": (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), ValueError, r"\(2, 3, 4, 5\)"),
    "list": (RGB.tolist(), TypeError, "got list"),
    "path": ("image.png", TypeError, "got str"),
    "bytes": (b"\x89PNG", TypeError, "got bytes"),
    "None": (None, TypeError, "got NoneType"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_ambiguous_is_refused(form):
    given, error, said = REFUSED[form]
    with pytest.raises(error, match=f"(?s)image of camera front.*{said}"):
        check_image(given, "front")


def test_a_file_that_is_cut_off_is_named():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pil(noise).save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()[:8000]))
    with pytest.raises(ValueError, match="camera 1 cannot be decoded"):
        check_image(image, 1)


@pytest.mark.parametrize("form", RIGHT)
def test_both_ports_see_the_same(form):
    given, expected = RIGHT[form]
    (found,) = openvla.check_images(given, 1)
    assert np.array_equal(found, expected)
    for images in (given, [given], (given,), {"front": given}):
        (found,) = pi0.check_images(images, ("front",))
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("form", [f for f in REFUSED if f not in ("path", "bytes", "None", "list")])
def test_both_ports_refuse_the_same(form):
    given, error, _ = REFUSED[form]
    if isinstance(given, np.ndarray | torch.Tensor) and given.ndim not in (2, 3):
        given = [given]
    with pytest.raises(error, match="camera"):
        openvla.check_images(given, 1)
    with pytest.raises(error, match="camera"):
        pi0.check_images(given, ("front",))


def test_lists_of_numbers_are_no_images():
    for images in (RGB.tolist(), [RGB.tolist()], (tuple(RGB.tolist()),)):
        with pytest.raises(TypeError, match="not lists of numbers"):
            openvla.check_images(images, 1)
        with pytest.raises(TypeError, match="not lists of numbers"):
            pi0.check_images(images, ("front",))


def test_a_batch_of_images_is_one_per_camera():
    both = np.stack([RGB, RGB[:, ::-1]])
    for images in (both, torch.from_numpy(both), list(both)):
        found = openvla.check_images(images, 2)
        assert np.array_equal(np.stack(found), both)
        found = pi0.check_images(images, ("a", "b"))
        assert np.array_equal(np.stack(found), both)
    with pytest.raises(ValueError, match=r"sees 1 camera\(s\), got 2"):
        openvla.check_images(both, 1)


@pytest.mark.parametrize("form", ["P", "CMYK", "I;16", "tensor, colours in front", "L"])
def test_what_a_policy_does_depends_on_what_is_seen_alone(form):
    given, expected = RIGHT[form]
    model = make_openvla()
    options = {"instruction": "pick up the can", "unnorm_key": "pick_place"}
    found = model.predict_action(given, **options)
    assert np.array_equal(found, model.predict_action(expected, **options))
    oft, state = make_oft(), np.zeros(8)
    found = oft.predict_action([given, given], proprio=state, **options)
    assert np.array_equal(found, oft.predict_action([expected] * 2, proprio=state, **options))
    flow, seen = make_pi0(), observation()
    found = flow.predict_actions([seen | {"images": [given, None]}])
    assert np.array_equal(found, flow.predict_actions([seen | {"images": [expected, None]}]))
