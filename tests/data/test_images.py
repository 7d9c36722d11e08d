"""Decoding of every kind of image that a data set may hold, honest or not, and the transforms."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agatool.config import CLIP_MEAN, CLIP_STD
from agatool.data.images import decode_image, eval_transform, image_size, to_tensor, train_transform
from agatool.errors import DataError

RED = (200, 30, 30)
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest undoes the filter that images.py sets


def saved(tmp_path: Path, image: Image.Image, kind: str, name: str = "x.img", **options: object) -> Path:
    path = tmp_path / name
    image.save(path, kind, **options)
    return path


def pixel(path: Path) -> tuple[int, ...]:
    image = decode_image(path)
    assert image.mode == "RGB"
    value = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF"])
def test_accepted_by_content_whatever_the_extension(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, Image.new("RGB", (20, 30), RED), kind, "lying.txt")
    assert image_size(path) == (20, 30)
    assert decode_image(path).size == (20, 30)
    assert np.allclose(pixel(path), RED, atol=6)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (100, 0), (255, 255, 255)),  # transparent: white shows
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),  # scaled, not clipped
        ("I;16", 257, (1, 1, 1)),
    ],
)
def test_png_modes(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    path = saved(tmp_path, Image.new(mode, (8, 8), colour), "PNG")  # type: ignore[arg-type]
    assert pixel(path) == expected


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    assert pixel(saved(tmp_path, image, "PNG")) == RED
    assert pixel(saved(tmp_path, image, "PNG", transparency=1)) == (255, 255, 255)
    assert pixel(saved(tmp_path, image, "GIF", transparency=0)) == RED


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = pixel(saved(tmp_path, cyan, "JPEG", quality=95))
    assert red < 40
    assert green > 200
    assert blue > 200


@pytest.mark.parametrize(("mode", "value", "grey"), [("I", 65535, 255), ("F", 0.5, 128), ("F", 255.0, 255)])
def test_deep_tiffs_are_scaled(tmp_path: Path, mode: str, value: float, grey: int) -> None:
    assert pixel(saved(tmp_path, Image.new(mode, (4, 4), value), "TIFF")) == (grey, grey, grey)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    path = saved(tmp_path, frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.allclose(pixel(path), RED, atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (20, 40), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 20, 10))  # white on top
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, "JPEG", exif=exif, quality=95)
    image = decode_image(path)
    assert image.size == image_size(path) == (20, 40)
    rows = np.asarray(image.convert("L"), dtype=float).mean(axis=1)
    assert rows[2] > 240
    assert rows[30] < 15


def test_broken_exif_costs_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (8, 6), RED), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffgarbage")
    assert decode_image(path).size == image_size(path) == (8, 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_images_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    path = saved(tmp_path, noise, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"x\.img: "):
        decode_image(path)


def png_of_size(width: int, height: int) -> bytes:
    """A tiny file whose header promises a huge image."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (100_000_000, 1)])
def test_decompression_bombs_are_refused_from_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(*size))
    for read in (decode_image, image_size):
        with pytest.raises(DataError, match=r"bomb\.png"):
            read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not a JPEG"),
        (b"\xff\xd8\xff", "bomb|not a|truncated|x.png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),  # EPS would start Ghostscript
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        decode_image(path)


def test_devices_pipes_folders_and_nothing_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "device.png", "link.png", "folder.png", "missing.png", "nul\0.png"):
        with pytest.raises(DataError, match="Cannot read image"):
            decode_image(tmp_path / name)


def test_random_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    path = tmp_path / "x"
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in random.integers(0, len(content), 8):
                content[place] = random.integers(0, 256)
            path.write_bytes(content)
            try:
                assert decode_image(path).mode == "RGB"
            except DataError as error:
                assert str(path) in error.message  # noqa: PT017


def test_decoding_does_not_import_torch() -> None:
    code = "import sys, agatool.data.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_to_tensor_squashes_to_height_and_width() -> None:
    image = Image.new("RGB", (10, 40), RED)
    image.paste((0, 0, 255), (0, 20, 10, 40))
    tensor = to_tensor(image, (64, 32))
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 64, 32)
    assert tuple(tensor[:, 5, 5].tolist()) == RED
    assert tuple(tensor[:, 60, 5].tolist()) == (0, 0, 255)


def batch(count: int = 8, height: int = 32, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=seeded(5))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(images: torch.Tensor, seed: int = 0, **options: float) -> torch.Tensor:
    chosen = {"flip": 0.0, "pad": 0.0, "erase": 0.0, **options}
    return train_transform(images, seeded(seed), CLIP_MEAN, CLIP_STD, **chosen)


def test_eval_transform_is_the_normalisation() -> None:
    images = batch()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = (images.float() / 255 - mean) / std
    assert torch.allclose(eval_transform(images, CLIP_MEAN, CLIP_STD), expected, atol=1e-5)


def test_train_transform_with_nothing_on_is_eval_transform() -> None:
    images = batch()
    assert torch.equal(augmented(images), eval_transform(images, CLIP_MEAN, CLIP_STD))
    assert augmented(images[:0], flip=0.5).shape == (0, 3, 32, 16)


def test_train_transform_is_a_pure_function_of_the_generator() -> None:
    images = batch()
    kept = images.clone()
    options = {"flip": 0.5, "pad": 0.1, "erase": 0.5}
    first = augmented(images, 3, **options)
    assert torch.equal(first, augmented(images, 3, **options))
    assert not torch.equal(first, augmented(images, 4, **options))
    assert torch.equal(images, kept)


def test_flip_mirrors_left_and_right_about_as_often_as_asked() -> None:
    images = batch(200)
    plain = eval_transform(images, CLIP_MEAN, CLIP_STD)
    assert torch.equal(augmented(images, flip=1.0), plain.flip(3))
    flipped = augmented(images, flip=0.3)
    share = sum(torch.equal(one, other) for one, other in zip(flipped, plain.flip(3), strict=True)) / 200
    assert 0.2 < share < 0.4


def test_shift_moves_by_at_most_the_margin_and_fills_with_the_mean() -> None:
    images = torch.zeros(300, 3, 32, 16, dtype=torch.uint8)
    images[:, :, 16, 8] = 255
    moved = augmented(images, pad=0.1)  # 3 pixels
    bright = (moved > 1).all(1).nonzero()
    assert len(bright) == 300
    assert sorted(set(bright[:, 1].tolist())) == list(range(13, 20))
    assert sorted(set(bright[:, 2].tolist())) == list(range(5, 12))
    down = bright[bright[:, 1] == 19][0]
    assert moved[down[0], :, 0, 8].abs().max() < 0.02  # the mean colour, to one 8-bit step


def test_erasing_fills_one_rectangle_with_the_mean() -> None:
    images = torch.full((200, 3, 32, 16), 255, dtype=torch.uint8)
    erased = augmented(images, erase=1.0)
    for image in erased:
        hole = (image == 0).all(0)
        rows, columns = hole.any(1), hole.any(0)
        assert hole.sum() == rows.sum() * columns.sum() > 0  # a full rectangle
        assert hole.float().mean() < 0.45
    half = augmented(images, erase=0.5)
    assert 0.35 < (half == 0).flatten(1).any(1).float().mean() < 0.65
