"""What sites and messengers do to a photo on its way: shrink it and compress it again.

A preset is in the list only where its size and quality were found in the program's source, in a statement of the
company or in somebody's measurement, and `source` says which. Sites change without notice and treat single uploads
differently, so a preset is one documented case, not a promise. Looked for on 2026-11-20 and left out, because no fixed
quality was found that can be checked: WhatsApp (an undated measurement from the time of the iPhone 4S, on Apple's own
quality scale), Instagram (1080 pixels is measured, the quality is not), Bluesky (WebP of undocumented quality) and
Mastodon (quality 90, but it limits the area, not a side).
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Compose, Transform
from .filters import Resize
from .jpeg import RealJPEG


@dataclass(frozen=True, kw_only=True)
class PublishingPreset:
    """One way to publish a photo.

    Attributes:
        long_side: pixels to which the longer side is reduced; smaller photos stay. None: no resizing.
        quality: JPEG quality on libjpeg's scale, 1 to 100. None: no compression.
        subsampling: chroma subsampling of that JPEG.
        source: where the numbers are from, and what of them is assumed.
    """

    long_side: int | None = None
    quality: int | None = None
    subsampling: str = "4:2:0"
    source: str


_PAPER = (
    "GAP-Diff (NDSS'25), evaluation code: Pillow at quality 70 by default, 50 and 90 suggested, Pillow's default "
    "subsampling 4:2:0, no resizing."
)

PUBLISHING: dict[str, PublishingPreset] = {
    "facebook": PublishingPreset(
        long_side=1920,
        quality=85,
        source=(
            "Measured by third parties, not documented by the site. Long side: 5120 became 1920 pixels "
            "(https://phototacopodcast.com/dimensions-and-quality-for-social-media-photo-sharing/, 2021; 2048 in "
            "http://blog.raastech.com/2013/12/high-quality-facebook-photos-are-not.html). Quality 85: ImageMagick's "
            "estimate, which is a heuristic (https://dsp.stackexchange.com/questions/74275, 2021, where Pillow at 85 "
            "gave another file; http://www.abrokenmold.net/2010/01/how-facebook-crunches-images/). Subsampling: "
            "assumed."
        ),
    ),
    "jpeg50": PublishingPreset(quality=50, source=_PAPER),
    "jpeg70": PublishingPreset(quality=70, source=_PAPER),
    "jpeg90": PublishingPreset(quality=90, source=_PAPER),
    "none": PublishingPreset(source="No processing: the control row, a photo that is shared as the file it is."),
    "signal": PublishingPreset(
        long_side=1600,
        quality=70,
        source=(
            "The program's source: Signal-Android, app/src/main/java/org/thoughtcrime/securesms/mms/"
            "PushMediaConstraints.java, MediaConfig LEVEL_1, the default for standard quality "
            "(https://github.com/signalapp/Signal-Android, commit 0f7f866562, read 2026-11-20). The company can set "
            "another level by region, and more than 1 MB is shrunk further: both are not modeled. Subsampling: "
            "assumed, Android's encoder decides."
        ),
    ),
    "telegram": PublishingPreset(
        long_side=1280,
        quality=87,
        source=(
            "The program's source: Telegram Desktop, Telegram/SourceFiles/storage/localimageloader.cpp, 1280 pixels "
            "and JPEG 87 for a photo that is not sent as a file (https://github.com/telegramdesktop/tdesktop, commit "
            "202534575b, read 2026-11-20). Other clients may differ. Subsampling: assumed, Qt's encoder decides."
        ),
    ),
    "x": PublishingPreset(
        long_side=4096,
        quality=85,
        source=(
            "Quality: stated by an engineer of the site, JPEG above 85 is transcoded to 85 and most PNG photos become "
            "JPEG (https://twittercommunity.com/t/upcoming-changes-to-png-image-support/118695, December 2018; some "
            "PNG files are kept). Long side: measured by a third party, 5120 became 4096 pixels "
            "(https://phototacopodcast.com/dimensions-and-quality-for-social-media-photo-sharing/, 2021). "
            "Subsampling: assumed."
        ),
    ),
}


class Publish(Compose):
    """Do to photos what publishing them does: `Resize` (never enlarges), then `RealJPEG`, as the preset says.

    A preset has no random part, so training and evaluation are the same. The size changes where the preset resizes.

    Raises:
        ValueError: there is no preset of that name.
    """

    def __init__(self, preset: str = "jpeg70"):
        if preset not in PUBLISHING:
            raise ValueError(f"preset: expected one of {', '.join(PUBLISHING)}, got {preset!r}")
        settings = PUBLISHING[preset]
        steps: list[Transform] = []
        if settings.long_side is not None:
            steps.append(Resize(long_side=settings.long_side))
        if settings.quality is not None:
            steps.append(RealJPEG(settings.quality, subsampling=settings.subsampling))
        super().__init__(steps)
        self.preset = preset

    def extra_repr(self) -> str:
        return f"{self.preset!r}"
