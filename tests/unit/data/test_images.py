import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from proxydet.data.images import find_image, image_size, open_image, read_image
from proxydet.errors import DataError

RGB = np.dstack(np.meshgrid(np.arange(0, 250, 50), np.arange(0, 250, 80), [77])).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_png(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "PNG")


def test_rgb_is_unchanged_from_file_and_bytes(tmp_path):
    data = encoded(Image.fromarray(RGB), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png")):
        pixels = read_image(source)
        np.testing.assert_array_equal(pixels, RGB)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        assert image_size(source) == RGB.shape[:2]


def test_grey_and_bilevel_get_three_equal_channels():
    grey = RGB[:, :, 0]
    np.testing.assert_array_equal(
        read_image(grey_png(grey)), np.repeat(grey[:, :, None], 3, axis=2)
    )
    bilevel = encoded(Image.fromarray(grey > 90), "PNG")
    assert set(np.unique(read_image(bilevel))) == {0, 255}


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    assert read_image(grey_png(values))[0, :, 1].tolist() == [0, 0, 1, 128, 255]
    wide = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert read_image(wide)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    "values",
    [np.array([[70000]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)],
)
def test_values_without_a_stated_range_are_refused(values):
    with pytest.raises(DataError, match="values"):
        read_image(encoded(Image.fromarray(values), "TIFF"), name="odd.tif")


def test_cmyk_jpeg_becomes_rgb():
    # C, M, Y, K as in a print file: no ink is white, full cyan has no red.
    cmyk = np.zeros((16, 16, 4), dtype=np.uint8)
    cmyk[:, 8:, 0] = 255
    bands = [Image.fromarray(cmyk[:, :, band]) for band in range(4)]
    pixels = read_image(encoded(Image.merge("CMYK", bands), "JPEG", quality=95))
    assert pixels.shape == (16, 16, 3)
    assert pixels[0, 0].min() > 240
    assert pixels[0, -1, 0] < 15
    assert pixels[0, -1, 1] > 240


def test_transparency_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, 1] = (200, 0, 0, 255)
    rgba[0, 2] = (0, 0, 0, 128)
    pixels = read_image(encoded(Image.fromarray(rgba), "PNG"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [200, 0, 0]
    assert abs(int(pixels[0, 2, 0]) - 127) <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    pixels = read_image(encoded(palette, "PNG", transparency=0))
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "MPO", "TGA"]
)
def test_an_image_outlives_its_file(kind, tmp_path):
    path = tmp_path / "picture"
    Image.fromarray(RGB).save(path, kind)
    picture = open_image(path)
    path.unlink()
    assert picture.mode == "RGB"
    with Image.open(io.BytesIO(encoded(Image.fromarray(RGB), kind))) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(picture.resize(picture.size)), expected)
    assert picture.tobytes("raw", "G") == expected[:, :, 1].tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB),
    }[orientation]
    np.testing.assert_array_equal(read_image(data), turned)
    assert image_size(data) == turned.shape[:2]
    np.testing.assert_array_equal(read_image(data, exif_orientation=False), RGB)
    assert image_size(data, exif_orientation=False) == RGB.shape[:2]


def test_one_pixel_and_the_first_frame_of_an_animation():
    assert read_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).tolist() == [[[255, 0, 0]]]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(animation)[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("keep", [0, 3, 30, 400, -2])
def test_a_truncated_jpeg_is_an_error_that_names_the_file(tmp_path, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    path = tmp_path / "half.jpg"
    path.write_bytes(encoded(Image.fromarray(noise), "JPEG")[:keep])
    if keep == -2:
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"half\.jpg"):
        read_image(path)


def test_what_is_no_image_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\x01\x02")
    for path, message in (
        (tmp_path / "a.jpg", "not an image of a known format"),
        (tmp_path / "b.jpg", "no such file"),
        (tmp_path, "cannot read"),
    ):
        for read in (read_image, image_size):
            with pytest.raises(DataError, match=message):
                read(path)
    with pytest.raises(DataError, match="member 7"):
        read_image(b"junk", name="member 7")


def test_a_decompression_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(DataError, match="decompression bomb"):
        read_image(encoded(Image.fromarray(RGB), "PNG"))


def test_images_are_found_below_roots_in_turn(tmp_path):
    for name in ("train2017/1.jpg", "val2017/2.jpg", "val2017/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    roots = (tmp_path / "train2017", tmp_path / "val2017")
    assert find_image("1.jpg", roots) == tmp_path / "train2017/1.jpg"
    assert find_image("2.jpg", roots) == tmp_path / "val2017/2.jpg"
    assert find_image("val2017/2.jpg", roots) == tmp_path / "val2017/2.jpg"
    assert find_image("val2017/1.jpg", (tmp_path,)) == tmp_path / "val2017/1.jpg"
    assert find_image("val2017\\1.jpg", (tmp_path,)) == tmp_path / "val2017/1.jpg"
    assert find_image(str(tmp_path / "val2017/1.jpg"), (tmp_path,)) == tmp_path / "val2017/1.jpg"
    with pytest.raises(DataError, match=r"'3\.jpg' is not there.*train2017.*val2017"):
        find_image("3.jpg", roots)


def test_nothing_outside_the_roots_is_found(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret.jpg").touch()
    names = [
        "../secret.jpg",
        "x/../../secret.jpg",
        "x\\..\\..\\secret.jpg",
        str(tmp_path / "secret.jpg"),
    ]
    for name in names:
        with pytest.raises(DataError, match=r"secret\.jpg"):
            find_image(name, (root,))
    # As exports for other folders have it: what is inside is found by its own name.
    (root / "secret.jpg").touch()
    (root / "in/a.jpg").touch()
    for name in [*names, "C:\\data\\secret.jpg", "./secret.jpg", "x/../secret.jpg"]:
        assert find_image(name, (root,)) == root / "secret.jpg"
    root.with_name(f"{root.name}.jpg").write_bytes(b"outside")
    for name in ("", ".", "in/.."):
        with pytest.raises(DataError, match="no file name"):
            find_image(name, (root,))
    assert find_image("./in//x/../a.jpg", (root,)) == root / "in/a.jpg"


def test_what_is_there_and_not_a_file_is_named(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "plain").touch()
    for name, why in (
        ("link.jpg", "link"),
        ("folder.jpg", "folder"),
        ("pipe.jpg", "regular file"),
        ("plain/a.jpg", "plain/a.jpg"),
        ("a" * 300, "too long"),
        ("null\0.jpg", "null"),
        ("\udcff.jpg", "udcff"),
        ("\ud800.jpg", "surrogates"),
        ("", "''"),
        ("..", "folder"),
    ):
        with pytest.raises(DataError, match=why):
            find_image(name, (tmp_path,))
    (tmp_path / "\udcff.jpg").touch()
    assert find_image("\udcff.jpg", (tmp_path,)) == tmp_path / "\udcff.jpg"


@pytest.mark.parametrize(
    "raised", [RuntimeError, struct.error, KeyError, TypeError, ZeroDivisionError]
)
def test_whatever_a_decoder_raises_is_an_error_that_names_the_image(monkeypatch, raised):
    def fail(*_: object) -> None:
        raise raised("inside")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="member 7"):
            read(encoded(Image.fromarray(RGB), "JPEG"), name="member 7")
