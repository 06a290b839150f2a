"""Photos from files and to files: what is kept, what is converted, what is refused, and the two measures."""

import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, features

from gap_diff_diffusers.images import (
    PHOTO_SUFFIXES,
    Photo,
    PhotoError,
    encode_photo,
    photo_size,
    psnr,
    read_photo,
    resize_pixels,
    ssim,
    write_atomically,
)

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.fixture
def gradient() -> np.ndarray:
    """No two corners alike, so that every turn shows; (24,32,3) uint8."""
    y, x = np.mgrid[:24, :32]
    return np.stack([x * 8, y * 10, (x + y) * 4], axis=2).astype(np.uint8)


# --- reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_read_upright(gradient, orientation, tmp_path):
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(gradient)
    stored = image.transpose(turn_back[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    photo = read_photo(tmp_path / "turned.png")
    assert (photo.pixels == gradient).all()
    kept = decode(encode_photo(photo, keep_metadata=True))
    assert kept.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert (np.asarray(kept) == gradient).all()


@pytest.mark.parametrize(
    ("mode", "gray", "alpha"),
    [
        ("1", True, False),
        ("L", True, False),
        ("LA", True, True),
        ("RGB", False, False),
        ("RGBA", False, True),
        ("P", False, False),
        ("I;16", True, False),
    ],
)
def test_modes(gradient, mode, gray, alpha, tmp_path):
    image = Image.fromarray(gradient)
    image = Image.fromarray(gradient[:, :, 0] * np.uint16(257)) if mode == "I;16" else image.convert(mode)
    if alpha:
        image.putalpha(Image.fromarray(gradient[:, :, 1]))
    image.save(tmp_path / "photo.png")
    photo = read_photo(tmp_path / "photo.png")
    assert photo.gray is gray
    assert photo.pixels.shape == gradient.shape and photo.pixels.dtype == np.uint8
    saved = decode(encode_photo(photo))
    assert saved.mode == ("L" if gray else "RGB") + ("A" if alpha else "")
    if alpha:
        assert (photo.alpha == gradient[:, :, 1]).all()
    else:
        assert photo.alpha is None
    for format in ("png", "webp"):
        again = read_photo(decode(encode_photo(photo, format=format)))
        assert (again.pixels == photo.pixels).all()
        assert alpha is False or (again.alpha == photo.alpha).all()


@pytest.mark.parametrize(("mode", "value"), [("1", 0), ("L", 92), ("RGB", (8, 0, 4)), ("P", 3), ("I;16", 2056)])
def test_one_transparent_color_becomes_alpha(gradient, mode, value, tmp_path):
    image = Image.fromarray(gradient)
    if mode == "I;16":
        image = Image.fromarray(gradient[:, :, 0] * np.uint16(257))
    else:
        image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "photo.png", transparency=value)
    photo = read_photo(tmp_path / "photo.png")
    assert photo.gray is (mode in ("1", "L", "I;16"))
    expected = np.asarray(Image.open(tmp_path / "photo.png").convert("RGBA").getchannel("A"))
    assert set(np.unique(photo.alpha)) == {0, 255}
    if mode != "I;16":  # which Pillow itself makes opaque
        assert (photo.alpha == expected).all()
    else:
        assert ((photo.alpha == 0) == (gradient[:, :, 0] == 8)).all()


def test_sixteen_bit_gray_is_rounded_exactly(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "deep.png")
    photo = read_photo(tmp_path / "deep.png")
    assert (photo.pixels[:, :, 0] == np.rint(values / 65535 * 255)).all()
    assert photo.gray and photo.notes == ("16 bits per channel became 8",)


def _deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which Pillow cannot write; (H,W,3) or (H,W,4) uint16."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, data) for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_color_becomes_the_same_eight_bits(gradient, channels, tmp_path):
    pixels = np.dstack([gradient, gradient[:, :, 1]])[:, :, :channels]
    (tmp_path / "deep.png").write_bytes(_deep_png(pixels * np.uint16(257)))
    photo = read_photo(tmp_path / "deep.png")
    assert (photo.pixels == gradient).all()
    assert channels == 3 or (photo.alpha == gradient[:, :, 1]).all()
    assert photo.notes == ("16 bits per channel became 8",)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".png", ".webp", ".gif", ".jpg"])
def test_eight_bits_are_not_called_sixteen(suffix, tmp_path):
    """Decoders' arguments hold a stride too: 1600 has a 16 in it."""
    Image.new("RGB", (1600, 16), (10, 20, 30)).save(tmp_path / f"photo{suffix}")
    assert read_photo(tmp_path / f"photo{suffix}").notes == ()


def test_cmyk_becomes_srgb_and_says_so(gradient, tmp_path):
    Image.fromarray(gradient).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    photo = read_photo(tmp_path / "print.jpg")
    assert photo.notes == ("CMYK became sRGB",) and photo.icc_profile is None
    assert np.abs(photo.pixels.astype(int) - gradient).mean() < 8


def test_a_cmyk_profile_that_is_none_is_refused(gradient, tmp_path):
    Image.fromarray(gradient).convert("CMYK").save(tmp_path / "print.jpg", icc_profile=b"nonsense" * 40)
    with pytest.raises(PhotoError, match=r"print\.jpg: .*convert it to RGB first"):
        read_photo(tmp_path / "print.jpg")


def test_several_pictures_of_a_phone_are_one_photo(gradient, tmp_path):
    image = Image.fromarray(gradient)
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[image.resize((16, 16))])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    assert read_photo(tmp_path / "phone.jpg").pixels.shape == gradient.shape


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_animations_and_stacks_are_refused(gradient, suffix, tmp_path):
    frames = [Image.fromarray(np.roll(gradient, shift)) for shift in (0, 30, 60)]
    frames[0].save(tmp_path / f"moving{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(PhotoError, match=rf"moving\{suffix}: expected one picture, got .* of 3; export"):
        read_photo(tmp_path / f"moving{suffix}")


def test_one_frame_of_a_gif_is_a_photo(gradient, tmp_path):
    Image.fromarray(gradient).save(tmp_path / "still.gif")
    assert read_photo(tmp_path / "still.gif").pixels.shape == gradient.shape


def _bomb() -> bytes:
    """A PNG of a few bytes that states 30000x30000 pixels."""
    data = bytearray(_deep_png(np.zeros((1, 1, 3), np.uint16)))
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello world, this is text", "expected an image"),
        (b"\xff\xd8\xff\xe0 no photo either", "expected an image|truncated"),
        (_bomb(), "decompression bomb; make it smaller"),
    ],
)
def test_what_is_no_photo_is_refused(content, message, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(PhotoError, match=message) as caught:
        read_photo(tmp_path / "bad.jpg")
    assert str(caught.value).startswith(str(tmp_path / "bad.jpg"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_are_refused(gradient, format, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, format)
    (tmp_path / "half").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(PhotoError, match="half: "):
        read_photo(tmp_path / "half")


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_pictures_without_room_are_refused(size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "tiny.png")
    with pytest.raises(PhotoError, match=f"expected at least 16x16 pixels, got {size[0]}x{size[1]}"):
        read_photo(tmp_path / "tiny.png")


def test_unusual_modes_are_refused(tmp_path):
    Image.new("F", (20, 20)).save(tmp_path / "float.tif")
    with pytest.raises(PhotoError, match="got mode 'F'; convert it to RGB"):
        read_photo(tmp_path / "float.tif")
    Image.new("I", (20, 20), 2**20).save(tmp_path / "wide.tif")
    with pytest.raises(PhotoError, match="got a 32-bit image"):
        read_photo(tmp_path / "wide.tif")


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(PhotoError, match="expected a photo, got a folder"):
        read_photo(tmp_path)
    with pytest.raises(PhotoError, match="there is no such file"):
        read_photo(tmp_path / "absent.jpg")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_damage_raises_nothing_but_photo_errors(gradient, format, tmp_path):
    """Bytes changed at random, in headers and EXIF above all."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    buffer = io.BytesIO()
    Image.fromarray(gradient).save(buffer, format, exif=exif)
    read = 0
    for case in range(150):
        data = bytearray(buffer.getvalue())
        end = len(data) if case % 2 else min(len(data), 200)
        for position in rng.integers(0, end, rng.integers(1, 8)):
            data[position] = rng.integers(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
                (tmp_path / "damaged").write_bytes(data)
                encode_photo(read_photo(tmp_path / "damaged"), keep_metadata=True)
            read += 1
        except PhotoError:
            pass
    assert read > 0


def test_a_big_photo_is_read_without_a_warning(tmp_path, monkeypatch):
    Image.new("L", (64, 48)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # of 3072 there are more than that, less than twice
    filters = list(warnings.filters)
    threads = [threading.Thread(target=read_photo, args=(tmp_path / "big.png",)) for _ in range(16)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_photo(tmp_path / "big.png")
        assert photo_size(tmp_path / "big.png") == (64, 48)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == filters


def test_photo_size_reads_the_header_alone(gradient, tmp_path):
    Image.fromarray(gradient).save(tmp_path / "photo.bmp")
    (tmp_path / "half.bmp").write_bytes((tmp_path / "photo.bmp").read_bytes()[:60])
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "bomb.png").write_bytes(_bomb())
    sizes = [photo_size(tmp_path / name) for name in ("photo.bmp", "half.bmp", "bad.png", "bomb.png", "absent.png")]
    assert sizes == [(32, 24), (32, 24), None, None, None]


def test_pil_images_are_taken_and_left_alone(gradient):
    image = Image.fromarray(gradient)
    image.info["icc_profile"] = PROFILE
    photo = read_photo(image)
    assert (photo.pixels == gradient).all() and photo.icc_profile == PROFILE
    photo.pixels[:] = 0
    assert (np.asarray(image) == gradient).all()


def test_suffixes_are_of_formats_that_pillow_reads():
    Image.init()
    known = set(Image.registered_extensions())
    optional = {".heic", ".heif"} | (set() if features.check("avif") else {".avif"})
    assert known >= PHOTO_SUFFIXES - optional


# --- writing


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_color_profiles_are_kept_byte_for_byte(gradient, format, tmp_path):
    profile = PROFILE + bytes(range(256)) * 300  # longer than one JPEG segment
    Image.fromarray(gradient).save(tmp_path / "photo.jpg", icc_profile=profile)
    photo = read_photo(tmp_path / "photo.jpg")
    assert decode(encode_photo(photo, format=format)).info["icc_profile"] == profile


def _with_exif(gradient: np.ndarray, path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] = "a lens"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 12.0, 30.0)
    Image.fromarray(gradient).save(path, exif=exif.tobytes())


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_and_place_are_dropped_unless_asked_for(gradient, suffix, format, tmp_path):
    _with_exif(gradient, tmp_path / f"photo{suffix}")
    photo = read_photo(tmp_path / f"photo{suffix}")
    assert photo.pixels.shape == (32, 24, 3)
    dropped = encode_photo(photo, format=format)
    assert not decode(dropped).getexif() and b"a camera" not in dropped
    exif = decode(encode_photo(photo, format=format, keep_metadata=True)).getexif()
    assert exif[ExifTags.Base.Make] == "a camera"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] == "a lens"
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (48.0, 12.0, 30.0)
    assert exif.get(ExifTags.Base.Orientation, 1) == 1
    assert exif.keys() <= {ExifTags.Base.Make, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, *range(282, 297)}


def test_kept_exif_has_no_thumbnail_of_the_original(gradient, tmp_path):
    """A thumbnail is a small unprotected copy."""
    thumbnail = io.BytesIO()
    Image.fromarray(gradient).save(thumbnail, "JPEG")
    ifd = struct.pack("<HHHII", 1, 0x010F, 2, 4, int.from_bytes(b"abc\0", "little"))
    offset = 8 + len(ifd) + 4
    second = struct.pack("<H", 2)
    second += struct.pack("<HHII", 0x0201, 4, 1, offset + 2 + 24 + 4)
    second += struct.pack("<HHII", 0x0202, 4, 1, len(thumbnail.getvalue())) + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", offset) + second + thumbnail.getvalue()
    Image.fromarray(gradient).save(tmp_path / "photo.jpg", exif=exif)
    assert (tmp_path / "photo.jpg").read_bytes().count(b"\xff\xd8\xff") == 2
    data = encode_photo(read_photo(tmp_path / "photo.jpg"), format="jpeg", keep_metadata=True)
    assert decode(data).getexif()[ExifTags.Base.Make] == "abc"
    assert data.count(b"\xff\xd8\xff") == 1


def test_lossless_formats_keep_transparent_pixels(gradient):
    photo = Photo(pixels=gradient, alpha=np.zeros(gradient.shape[:2], np.uint8))
    for format in ("png", "webp"):
        assert (read_photo(decode(encode_photo(photo, format=format))).pixels == gradient).all()


def test_quality_decides_what_lossy_formats_lose(gradient):
    photo = Photo(pixels=np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("jpeg", "webp"):
        low, high = (read_photo(decode(encode_photo(photo, format=format, quality=q))) for q in (1, 100))
        assert psnr(low.pixels, photo.pixels) < psnr(high.pixels, photo.pixels)
    assert decode(encode_photo(photo, format="jpeg")).layer[0][1:3] == (1, 1)  # 4:4:4: color at full resolution


def test_what_a_format_cannot_hold_is_refused(gradient):
    transparent = Photo(pixels=gradient, alpha=gradient[:, :, 0])
    with pytest.raises(PhotoError, match="JPEG has no transparency; save it as PNG or WebP"):
        encode_photo(transparent, format="jpeg")
    wide = Photo(pixels=np.zeros((16, 16384, 3), np.uint8))
    with pytest.raises(PhotoError, match="WEBP holds at most 16383 px a side, got 16384x16; save it as PNG"):
        encode_photo(wide, format="webp")
    with pytest.raises(PhotoError, match="cannot be saved as JPEG"):
        encode_photo(Photo(pixels=gradient, exif=b"Exif\0\0" + bytes(70000)), format="jpeg", keep_metadata=True)
    with pytest.raises(ValueError, match="expected format 'png', 'jpeg' or 'webp', got 'gif'"):
        encode_photo(transparent, format="gif")


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "photo.png"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def refuse(temporary):
        assert temporary.read_bytes() == b"second" and temporary.name.startswith(".")
        raise PhotoError("refused")

    with pytest.raises(PhotoError, match="refused"):
        write_atomically(path, b"second", refuse)
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"first"
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder.png", b"a folder is there")
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "photo.png", b"no folder is there")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.png", "photo.png"]


def test_long_names_can_be_written(tmp_path):
    name = "写" * 83 + ".png"  # 253 bytes of the 255 that file systems allow
    write_atomically(tmp_path / name, b"data")
    assert (tmp_path / name).read_bytes() == b"data"


# --- measuring


@pytest.mark.parametrize("size", [(64, 80), (37, 53), (200, 150)])
@pytest.mark.parametrize("noise", [1, 8, 40])
def test_ssim_is_kornias(size, noise):
    import torch
    from kornia.metrics import ssim as reference_ssim

    rng = np.random.default_rng(0)
    smooth = np.array(Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size[::-1]))
    noisy = np.clip(smooth + rng.normal(0, noise, smooth.shape), 0, 255).astype(np.uint8)
    weights = torch.tensor((0.299, 0.587, 0.114)).double()
    x, y = ((torch.from_numpy(p).double() @ weights)[None, None] / 255 for p in (noisy, smooth))
    expected = reference_ssim(x, y, 11, padding="valid").mean().item()
    assert ssim(noisy, smooth) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (1100, 1030)])
def test_psnr_is_its_definition(size):
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(2))
    expected = 10 * np.log10(255**2 / np.mean((x.astype(float) - y) ** 2))
    assert psnr(x, y) == pytest.approx(expected, abs=1e-6)


def test_equal_photos_are_equal(gradient):
    assert psnr(gradient, gradient) == float("inf")
    assert ssim(gradient, gradient) == pytest.approx(1)
    assert ssim(np.zeros((600, 1100, 3), np.uint8), np.zeros((600, 1100, 3), np.uint8)) == pytest.approx(1)


def test_resizing_averages_going_down(gradient):
    checks = np.indices((64, 64)).sum(0)[:, :, None].repeat(3, 2) % 2 * np.uint8(255)
    assert np.abs(resize_pixels(checks.astype(np.uint8), 16, 16).astype(int) - 127).max() <= 2
    assert resize_pixels(gradient, 24, 32) is gradient
