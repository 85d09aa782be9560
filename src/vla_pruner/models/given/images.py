"""A camera's image, in whatever form it comes, as uint8 [H, W, 3]; what is ambiguous is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_NO_RANGE = {"I": "32-bit numbers", "F": "floating-point numbers"}
_TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")


def is_one_image(images: Any) -> bool:
    """Whether this is an image itself, not a list of them: [H, W], [H, W, C], [C, H, W] or PIL."""
    if isinstance(images, Image.Image):
        return True
    return isinstance(images, np.ndarray | Tensor) and images.ndim in (2, 3)


def check_nesting(images: Any) -> None:
    """Refuse images that are lists of numbers themselves. Errors: TypeError."""
    if isinstance(images, list | tuple) and any(isinstance(each, list | tuple) for each in images):
        raise TypeError(
            "images must be arrays, tensors or PIL images, not lists of numbers; give "
            "`np.asarray(image, dtype=np.uint8)`"
        )


def check_image(image: Any, camera: int | str) -> np.ndarray:
    """A camera's image as uint8 [H, W, 3].

    PIL images of any mode that says what its numbers mean, turned upright as their EXIF entry says;
    uint8 arrays [H, W, 3], or [H, W, 4] if they are opaque; uint8 tensors of the same shapes or
    with colours in front, [3, H, W].

    Errors: TypeError (type, dtype, mode), ValueError (shape, transparency, damage).
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, camera)
    if isinstance(image, Tensor):
        return _from_array(_from_tensor(image, camera), camera)
    if not isinstance(image, np.ndarray) or isinstance(image, np.ma.MaskedArray):
        raise TypeError(
            f"image of camera {camera} must be a numpy array or a PIL image, got "
            f"{type(image).__name__}"
        )
    return _from_array(image, camera)


def _from_pil(image: Image.Image, camera: int | str) -> np.ndarray:
    try:
        image.load()
        image = ImageOps.exif_transpose(image) or image
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image of camera {camera} cannot be decoded: {error}") from error
    if image.mode in _NO_RANGE:
        raise TypeError(
            f"image of camera {camera} has PIL mode {image.mode!r}, {_NO_RANGE[image.mode]} of no "
            "known range; scale it to 0..255 and convert it to 'L' or 'RGB'"
        )
    if image.mode in _SIXTEEN_BIT:
        # 0..65535: 257 times 0..255.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        return _from_array(np.asarray(image.convert("RGBA")), camera)
    try:
        colours = image.convert("RGB")
    except ValueError as error:
        raise TypeError(
            f"image of camera {camera} has PIL mode {image.mode!r}, which PIL cannot convert to "
            f"'RGB' ({error})"
        ) from error
    return _from_array(np.asarray(colours), camera)


def _from_tensor(image: Tensor, camera: int | str) -> np.ndarray:
    """[H, W, C] from a tensor with colours in front, as torch has them, or behind."""
    _check_dtype(str(image.dtype).removeprefix("torch."), image.dtype == torch.uint8, camera)
    found = image.detach().cpu().numpy()
    in_front, behind = (image.ndim == 3 and image.shape[axis] in (3, 4) for axis in (0, -1))
    if in_front and behind:
        raise ValueError(
            f"image of camera {camera} has shape {tuple(image.shape)}: colours may be in front or "
            "behind; give a numpy array [height, width, 3]"
        )
    return np.moveaxis(found, 0, -1) if in_front else found


def _from_array(image: np.ndarray, camera: int | str) -> np.ndarray:
    _check_dtype(str(image.dtype), image.dtype == np.uint8, camera)
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        hint = " (grey: `np.stack([image] * 3, axis=-1)`)" if image.ndim == 2 else ""
        if image.ndim == 3 and image.shape[0] == 3:
            hint = " (colours are in front here: `image.transpose(1, 2, 0)`)"
        raise ValueError(
            f"image of camera {camera} has shape {image.shape}; expected [height, width, 3]{hint}"
        )
    if image.shape[2] == 4 and (image[..., 3] != 255).any():
        raise ValueError(
            f"image of camera {camera} has transparent pixels; lay it over the background that the "
            "policy should see, or leave the fourth channel out"
        )
    return image[..., :3]


def _check_dtype(dtype: str, fits: bool, camera: int | str) -> None:
    if not fits:
        raise TypeError(
            f"image of camera {camera} has dtype {dtype}; expected uint8 values 0..255 "
            "(multiply by 255 and round if yours are in [0, 1]; divide by 257 and round if they "
            "are 16-bit colours)"
        )
