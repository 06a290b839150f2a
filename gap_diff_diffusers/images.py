"""The image contract: what a photo is, from the file it comes from to the file it goes to.

Inside, a photo is 8-bit RGB pixels with its alpha, color profile and EXIF beside them; networks see float32 NCHW in
[0,1].
torch is imported where it computes: whether a file is a photo at all can be said without waiting for it.
"""

import importlib
import io
import math
import os
import re
import secrets
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

MINIMUM_SIDE = 16
JPEG_QUALITY = 95
PHOTO_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
)

SRGB_GAMMA = 0.45455  # as PNG's gAMA states it
MAXIMUM_SIDE = {"jpeg": 65500, "webp": 16383}  # what the formats hold
# What Pillow's decoders raise for damaged data, besides UnidentifiedImageError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Tags that describe how a TIFF stores its pixels; Pillow lists them among its EXIF.
_STORAGE_TAGS = frozenset(
    (*range(254, 260), 262, 266, 273, *range(277, 280), 284, 317, *range(320, 326), 330, 338, 339)
)
_STORAGE_TAGS |= {347, 529, 530, 531, 532, 700, 33723, 34377, 34675}
_warning_filters = threading.Lock()  # they are the process's, and photos are read in threads


class PhotoError(ValueError):
    """A photo that cannot be read, protected or saved. Says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An 8-bit photo, upright.

    Attributes:
        pixels: (H,W,3) uint8 RGB, in the photo's own color profile; a gray photo has three equal channels.
        alpha: (H,W) uint8, or None.
        gray: whether it came, and is saved, as gray.
        icc_profile, exif: as bytes, or None. EXIF without its orientation, which the pixels now have.
        notes: what reading had to change, one sentence each.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    gray: bool = False
    icc_profile: bytes | None = None
    exif: bytes | None = None
    notes: tuple[str, ...] = ()

    def to_pil(self) -> Image.Image:
        """As PIL in mode L, LA, RGB or RGBA, with the color profile in `info`; EXIF is left out."""
        image = Image.fromarray(self.pixels[:, :, 0] if self.gray else self.pixels)
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        if self.icc_profile:
            image.info["icc_profile"] = self.icc_profile
        return image


def read_photo(source: str | os.PathLike | Image.Image) -> Photo:
    """Read a photo from a file or take it from PIL.

    Turns it upright (EXIF), keeps alpha, color profile and gray; palettes become RGB(A), CMYK becomes sRGB, 16 bits
    become 8. Files whose first of several pictures is the photo (MPO, as phones write) count as one picture.

    Raises:
        PhotoError: missing, empty, truncated, not an image, animated, too many or too few pixels, an unknown mode.
    """
    if isinstance(source, Image.Image):
        try:
            return _from_pil(source)
        except PhotoError:
            raise
        except _DECODING_ERRORS as error:
            raise PhotoError(f"cannot be read, is it truncated or damaged? ({error})") from error
    path = Path(source)
    if path.is_dir():
        raise PhotoError(f"{path}: expected a photo, got a folder")
    try:
        if path.stat().st_size == 0:
            raise PhotoError(f"{path}: the file is empty (0 bytes)")
        if path.suffix.lower() in (".heic", ".heif"):
            _register_heif(path)
        with _open(path) as image:
            return _from_pil(image)
    except PhotoError as error:
        raise error if str(error).startswith(str(path)) else PhotoError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise PhotoError(f"{path}: there is no such file") from error
    except UnidentifiedImageError as error:
        raise PhotoError(f"{path}: expected an image (JPEG, PNG, WebP, TIFF, ...), got something else") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise PhotoError(
            f"{path}: more than {limit} megapixels, which may be a decompression bomb; make it smaller first"
        ) from error
    except PermissionError as error:
        raise PhotoError(f"{path}: may not be read; check its permissions") from error
    except _DECODING_ERRORS as error:
        raise PhotoError(f"{path}: cannot be read, is it truncated or damaged? ({error})") from error


def photo_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Width and height that the file's header states, before any turning; None if it states nothing."""
    try:
        with _open(path) as image:
            return image.size
    except (*_DECODING_ERRORS, Image.DecompressionBombError):
        return None


def _open(path: str | os.PathLike) -> Image.Image:
    with _warning_filters, warnings.catch_warnings():
        # Up to Pillow's limit a big photo is welcome; past twice of it Pillow raises DecompressionBombError.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _register_heif(path: Path) -> None:
    try:
        # By name: an import statement would make diffusers ask everyone who loads this as remote code to install it.
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise PhotoError(f"{path}: HEIC needs an extra: pip install 'gap_diff_diffusers[heic]'") from error


def _from_pil(image: Image.Image) -> Photo:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise PhotoError(f"expected one picture, got an animation or a stack of {frames}; export one of them")
    if min(image.size) < MINIMUM_SIDE:
        raise PhotoError(
            f"expected at least {MINIMUM_SIDE}x{MINIMUM_SIDE} pixels, got {image.width}x{image.height}; "
            "there is nothing to protect in a picture this small"
        )
    notes = []
    # A tile's arguments begin with the layout of the file's pixels: RGB;16B; BGR;16 is 16 bits per pixel.
    sixteen_bits = re.match(r"\W*\w+;16[BLN]", str(image.tile[0].args)) if getattr(image, "tile", None) else False
    icc_profile = image.info.get("icc_profile")
    image.load()
    image, exif, damaged = _upright(image)
    if damaged:
        notes.append("its EXIF is damaged and was ignored")
    transparent = image.info.get("transparency")
    alpha = None
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PhotoError("expected values of at most 16 bits, got a 32-bit image; convert it to 8 bits first")
        if isinstance(transparent, int):
            alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        # Mode I is what Pillow makes of 16-bit files, and of 8-bit pictures that were converted to it.
        sixteen_bits = bool(sixteen_bits) or image.mode != "I" or bool(values.max() > 255)
        if sixteen_bits:
            values = (values.astype(np.uint32) * 255 + 32767) // 65535
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode == "CMYK":
        image, icc_profile = _cmyk_to_srgb(image, icc_profile), None
        notes.append("CMYK became sRGB")
    elif image.mode in ("1", "L", "RGB", "P") and transparent is not None:
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode not in ("RGB", "RGBA", "RGBX", "L", "LA", "1", "P", "PA", "YCbCr"):
        raise PhotoError(f"expected an RGB, gray, palette or CMYK image, got mode {image.mode!r}; convert it to RGB")
    if sixteen_bits:
        notes.append("16 bits per channel became 8")
    if abs(image.info.get("gamma", SRGB_GAMMA) - SRGB_GAMMA) > 0.01 and not (icc_profile or "srgb" in image.info):
        notes.append("its gamma (gAMA) is left out; viewers that heed it show the copy darker or brighter")
    if image.mode == "PA":
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        alpha = np.array(image.getchannel("A"))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    gray = image.mode in ("1", "L", "LA")
    return Photo(pixels=pixels, alpha=alpha, gray=gray, icc_profile=icc_profile, exif=exif, notes=tuple(notes))


def _upright(image: Image.Image) -> tuple[Image.Image, bytes | None, bool]:
    """The loaded image turned as its EXIF says, its EXIF without that, and whether its EXIF was damaged."""
    try:
        exif = image.getexif()
        if exif.get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
            exif = image.getexif()
        for tag in _STORAGE_TAGS & exif.keys():
            del exif[tag]
        return image, (exif.tobytes() if len(exif) else None), False
    except _DECODING_ERRORS:
        return image, None, True


def _cmyk_to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    if icc_profile is None:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise PhotoError(f"its CMYK color profile cannot be used ({error}); convert it to RGB first") from error


def encode_photo(
    photo: Photo, *, format: str = "png", quality: int | None = None, keep_metadata: bool = False
) -> bytes:
    """Encode a photo as the bytes of a file.

    Args:
        format: `"png"`, `"jpeg"` (4:4:4) or `"webp"`.
        quality: 1..100, for JPEG (default: `JPEG_QUALITY`) and WebP (default: lossless).
        keep_metadata: write the photo's EXIF too. Its color profile is always kept.
    """
    if format == "jpeg" and photo.alpha is not None:
        raise PhotoError("JPEG has no transparency; save it as PNG or WebP")
    limit = MAXIMUM_SIDE.get(format)
    if limit and max(photo.pixels.shape) > limit:
        height, width = photo.pixels.shape[:2]
        raise PhotoError(f"{format.upper()} holds at most {limit} px a side, got {width}x{height}; save it as PNG")
    if format == "webp" and photo.gray and photo.icc_profile and photo.icc_profile[16:20] == b"GRAY":
        raise PhotoError("WebP has no gray pixels that its gray color profile would fit; save it as PNG or JPEG")
    options: dict = {"exif": photo.exif} if keep_metadata and photo.exif else {}
    if photo.icc_profile:
        options["icc_profile"] = photo.icc_profile
    if format == "jpeg":
        options |= {"quality": JPEG_QUALITY if quality is None else quality, "subsampling": 0}
    elif format == "webp":
        options |= {"exact": True}  # the color of transparent pixels too
        # Lossless, quality is the effort: on a protected photo none makes the same size in half the time.
        options |= {"lossless": True, "method": 1, "quality": 0} if quality is None else {"quality": quality}
    elif format == "png":
        # A protected photo is noise to a search for repeats: runs alone make as small a file as level 6, in a third of
        # the time (0.44 MB in 18 against 66 ms for 512x512, 38 MB in 1.9 against 5.4 s for 24 megapixels).
        options["compress_type"] = zlib.Z_RLE
    else:
        raise ValueError(f"expected format 'png', 'jpeg' or 'webp', got {format!r}")
    buffer = io.BytesIO()
    image = photo.to_pil()
    image.info.clear()  # what goes into the file is said above
    try:
        image.save(buffer, format.upper(), **options)
    except (OSError, ValueError) as error:
        raise PhotoError(f"cannot be saved as {format.upper()} ({error})") from error
    return buffer.getvalue()


def write_atomically(path: str | os.PathLike, data: bytes, check: Callable[[Path], object] = lambda _: None) -> None:
    """Write a file through a temporary one beside it and a rename: at any moment it is whole or not there.

    `check` gets the temporary file before the rename; if it raises, nothing is left.
    """
    path = Path(path)
    # Not tempfile's: its files are private, and to make them like any other one has to set the umask of all threads.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        check(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def with_pixels(photo: Photo, pixels: np.ndarray) -> Photo:
    """The same photo with other pixels (H,W,3) uint8."""
    return replace(photo, pixels=pixels)


def resize_pixels(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H,W,3) uint8 with an antialiased bicubic filter."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch
    import torch.nn.functional as F

    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    images = F.interpolate(images, size=(height, width), mode="bicubic", antialias=True)
    return images[0].permute(1, 2, 0).contiguous().numpy()


def psnr(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two (H,W,3) uint8 images; infinite where they are equal."""
    import torch

    rows = max(1, 2**20 // pixels.shape[1])
    total = 0.0
    for start in range(0, len(pixels), rows):
        strip = slice(start, start + rows)
        difference = torch.from_numpy(pixels[strip]).to(torch.int16) - torch.from_numpy(reference[strip])
        total += difference.float().square_().sum(dtype=torch.float64).item()
    return math.inf if total == 0 else 10 * math.log10(255**2 * pixels.size / total)


def ssim(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two (H,W,3) uint8 images: the mean over the luma, 11x11 Gaussian window of sigma 1.5.

    Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004. As its authors advise
    for what a person sees at once, photos are first averaged down by a whole factor, here to a short side of 512 to
    1023 px.
    """
    import torch
    import torch.nn.functional as F

    luma = torch.tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)
    factor = max(1, min(pixels.shape[:2]) // 512)
    size = (pixels.shape[0] // factor, pixels.shape[1] // factor)
    x, y = (
        (torch.from_numpy(resize_pixels(p, *size)).permute(2, 0, 1)[None].float() * luma).sum(1, keepdim=True)
        for p in (pixels, reference)
    )
    window = torch.exp(-((torch.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 1, 11)

    def blur(z):
        return F.conv2d(F.conv2d(z, window), window.transpose(2, 3))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean().item()
