"""The generator of GAP-Diff: a photo in, its protective perturbation out, in one forward pass.

Paper: GAP-Diff: Protecting JPEG-Compressed Images from Diffusion-based Facial Customization (NDSS 2025), section IV.

Differences from upstream (AIASLab/GAP-Diff): the default network is another, smaller one. The paper's U-Net, which
loads the released weights, normalizes each photo by its own statistics also within a batch, and has no dropout:
upstream generates in train mode, so that the same photo gives another perturbation every time.

This file is part of the published format: a saved pipeline names it by its module path, and a Hub repository carries a
copy of it for `trust_remote_code=True`. So it never moves, and it imports nothing but torch and diffusers.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ImageBatchNorm2d(nn.Module):
    """Batch normalization with the statistics of one image: over H and W of each sample, never over the batch.

    What `BatchNorm2d` computes in train mode for a batch of one, which is how the released network generates. It has
    no running statistics.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(hidden_states, weight=self.weight, bias=self.bias, eps=self.eps)


class PaperResidualBlock(nn.Module):
    """[reflection padding, 3x3 convolution, norm, ReLU, reflection padding, 3x3 convolution, norm] + identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm1 = ImageBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm2 = ImageBatchNorm2d(channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.norm1(self.conv1(hidden_states)))
        return hidden_states + self.norm2(self.conv2(residual))


class PaperUNet(nn.Module):
    """The paper's U-Net, with the released network's quirks, so that its weights give its perturbation.

    Eight stride-2 convolutions down and eight up. `norms` has four entries because upstream has four: each is used
    wherever its channel count occurs (512: eight times). The skips carry what the encoder's activations left behind,
    because upstream's LeakyReLU works in place. Upstream generates with batch statistics of one image and with dropout
    on; here the statistics are those of each image and there is no dropout.
    """

    def __init__(self, channels: int):
        super().__init__()
        c1, c2, c4, c8 = channels, channels * 2, channels * 4, channels * 8
        widths = (3, c1, c2, c4, c8, c8, c8, c8, c8)
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths[:-1], widths[1:]))
        self.blocks = nn.Sequential(*(PaperResidualBlock(c8) for _ in range(4)))
        ups = ((c8, c8), *((c8 * 2, c8),) * 3, (c8 * 2, c4), (c4 * 2, c2), (c2 * 2, c1), (c1 * 2, 3))
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in ups)
        self.norms = nn.ModuleDict({str(c): ImageBatchNorm2d(c) for c in (c1, c2, c4, c8)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden_states = self.encoder[0](images)
        skips = []
        for conv in self.encoder[1:]:
            hidden_states = F.leaky_relu(hidden_states, 0.2)
            skips.append(hidden_states)
            hidden_states = conv(hidden_states)
            if conv is not self.encoder[-1]:
                hidden_states = self._norm(hidden_states)
        hidden_states = self.blocks(hidden_states)
        for deconv in self.decoder[:-1]:
            hidden_states = self._norm(deconv(F.selu(hidden_states)))
            hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
        return torch.tanh(self.decoder[-1](F.selu(hidden_states)))

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norms[str(hidden_states.shape[1])](hidden_states)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel: nothing depends on the photo's size or on the batch."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mean_square = hidden_states.float().square().mean(dim=1, keepdim=True)
        return hidden_states * torch.rsqrt(mean_square + self.eps).to(hidden_states.dtype) * self.weight


class ResidualBlock(nn.Module):
    """Norm, 3x3 convolution, SiLU, 3x3 convolution, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():  # starts close to the identity
            self.conv2.weight.mul_(0.1)
            self.conv2.bias.zero_()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.conv2(F.silu(self.conv1(self.norm(hidden_states))))


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (N,3,H,W) to (height, width), bicubic with antialias, in float32: torch has no other on the CPU."""
    images = images.float()
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images.contiguous(), size=tuple(size), mode="bicubic", antialias=True)


def _gain(images: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """The factor (N,1,1,1), at most 1, after which images (N,C,H,W), clipped to [-1,1], have that mean square."""
    gain = torch.ones_like(power)
    for _ in range(8):
        clipped = (images * gain).clamp(-1, 1).square().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        gain = (gain * (power / clipped).sqrt()).clamp(max=1)
    return gain.detach()


def pad_by_mirroring(images: torch.Tensor, before: tuple[int, int], margin: int, multiple: int) -> torch.Tensor:
    """Mirror (N,C,H,W) at its edges: `before` rows and columns at the top and left, as much at the bottom and right as
    make two margins of it, and up to a multiple; any size from 1 px."""
    for dim, first in zip((2, 3), before):
        size = images.shape[dim]
        length = size + 2 * margin
        length += -length % multiple
        index = torch.arange(-first, length - first, device=images.device) % (2 * size)
        images = images.index_select(dim, torch.minimum(index, 2 * size - 1 - index))
    return images


def photo_keys(images: torch.Tensor, count: int) -> torch.Tensor:
    """Two numbers below `count` for each photo (N,3,H,W) in [0,1]: (N,2), by chance, but the same for the same photo.

    They are checksums of 8 x 8 mean colors, which hardly depend on the photo's resolution or on rounding.
    """
    colors = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
    place = torch.arange(1, colors.shape[1] + 1, device=images.device)
    weights = torch.stack([place.square() % 31 - 15, (place * 7 + place.square() * 3) % 29 - 14]) / 10
    return ((colors @ weights.T) % 1 * count).long().clamp(max=count - 1)


class CompactUNet(nn.Module):
    """A small U-Net that sees the photo, and draws the perturbation, at a fraction of the resolution.

    Finer detail than that would neither survive JPEG nor the resizing before personalization. It works on blocks of
    `patch_size` x `patch_size` of those coarser pixels, one level per width, a residual block (or more) per level on
    the way down and up. The coarsest level also gets a summary of the whole photo.
    """

    patch_size = 4

    def __init__(
        self,
        channels: tuple[int, ...],
        layers_per_block: tuple[int, ...],
        downscale: int,
        output_gain: float,
        keyed_grid: bool,
    ):
        super().__init__()
        self.downscale = downscale
        self.output_gain = output_gain
        self.keyed_grid = keyed_grid
        patch_channels = 3 * self.patch_size**2
        self.conv_in = nn.Conv2d(patch_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(c) for _ in range(n))) for c, n in zip(channels[:-1], layers_per_block)
        )
        self.downsamplers = nn.ModuleList(nn.Conv2d(i, o, 2, 2) for i, o in zip(channels[:-1], channels[1:]))
        self.mid_block = nn.Sequential(*(ResidualBlock(channels[-1]) for _ in range(layers_per_block[-1])))
        self.summary = nn.Sequential(
            nn.Linear(channels[-1], channels[-1]), nn.SiLU(), nn.Linear(channels[-1], channels[-1])
        )
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(o, i, 2, 2) for i, o in zip(channels[-2::-1], channels[:0:-1])
        )
        self.up_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(c) for _ in range(n)))
            for c, n in zip(channels[-2::-1], layers_per_block[-2::-1])
        )
        self.norm_out = ChannelNorm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], patch_channels, 3, padding=1)

    def grid_offsets(self, images: torch.Tensor) -> torch.Tensor:
        """How many pixels above and left of each photo (N,3,H,W) in [0,1] the grid of blocks begins: (N,2) integers.

        With a keyed grid one block, none, or one less than none.
        """
        if not self.keyed_grid:
            return torch.zeros((len(images), 2), dtype=torch.long, device=images.device)
        return (photo_keys(images, 3) - 1) * self.patch_size * self.downscale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        hidden_states = F.avg_pool2d(images, self.downscale, ceil_mode=True, count_include_pad=False)
        # What zero padding does near the network's edges stays inside the margin, which is cut off again.
        margin, multiple = 8, self.patch_size * 2 ** len(self.downsamplers)
        offsets = self.grid_offsets(images / 2 + 0.5) // self.downscale + margin
        before = [(top, left) for top, left in offsets.tolist()]
        hidden_states = torch.cat(
            [pad_by_mirroring(h[None], first, margin, multiple) for h, first in zip(hidden_states, before)]
        )
        hidden_states = F.pixel_unshuffle(hidden_states, self.patch_size)
        hidden_states = self.conv_in(hidden_states.contiguous(memory_format=torch.channels_last))
        skips = []
        for block, downsampler in zip(self.down_blocks, self.downsamplers):
            hidden_states = block(hidden_states)
            skips.append(hidden_states)
            hidden_states = downsampler(hidden_states)
        summary = self.summary(hidden_states.mean(dim=(2, 3)))
        hidden_states = self.mid_block(hidden_states + summary[:, :, None, None])
        for upsampler, block in zip(self.upsamplers, self.up_blocks):
            hidden_states = block(upsampler(hidden_states) + skips.pop())
        hidden_states = self.conv_out(F.silu(self.norm_out(hidden_states)))
        perturbation = torch.tanh(F.pixel_shuffle(hidden_states, self.patch_size))
        size = (perturbation.shape[-2] * self.downscale, perturbation.shape[-1] * self.downscale)
        perturbation = (self.output_gain * resize(perturbation, size)).clamp(-1, 1).to(images.dtype)
        starts = [(top * self.downscale, left * self.downscale) for top, left in before]
        return torch.stack(
            [p[:, top : top + height, left : left + width] for p, (top, left) in zip(perturbation, starts)]
        )


class GAPDiffGenerator(ModelMixin, ConfigMixin):
    """Perturbation generator of GAP-Diff.

    Args:
        architecture: `"compact"`, the default network: small, and any height and width from 16 px up; or `"paper"`,
            the U-Net of the paper (section IV-B), which takes multiples of 256 from 512 px up.
        channels: widths. Compact: one per level, finest first. Paper: one number, 64 in the paper.
        layers_per_block: compact only: residual blocks per level, the last number in the middle.
        downscale: compact only: the network works at 1/downscale of the resolution.
        output_gain: compact only: factor after the enlargement to the photo's resolution, which softens the
            perturbation's finest detail; what then exceeds 1 is clipped.
        keyed_grid: compact only: a checksum of the photo decides where the network's grid of blocks begins, so that
            what it draws everywhere is elsewhere in every photo, and the mean of many perturbations holds less of it.
        native_size: side in pixels at which the network was trained to see a face crop; the pipeline computes the
            perturbation of a bigger photo at scales that fit.
        scale_range: how many times longer than the smallest crop that is to be protected a photo may be. 1, as for the
            paper's weights, computes every perturbation at the native size alone.
    """

    _supports_gradient_checkpointing = False
    minimum_size = {"compact": 16, "paper": 512}
    architectures = tuple(minimum_size)
    most_power = 0.63  # mean square of a sum of scales: 32.1 dB at 8 levels

    @register_to_config
    def __init__(
        self,
        architecture: str = "compact",
        channels: tuple[int, ...] = (96, 160, 192),
        layers_per_block: tuple[int, ...] = (1, 1, 1),
        downscale: int = 2,
        output_gain: float = 1.0,
        native_size: int = 512,
        scale_range: float = 5.0,
        keyed_grid: bool = False,
    ):
        super().__init__()
        if architecture == "compact":
            if len(channels) != len(layers_per_block):
                raise ValueError(
                    f"expected as many channels as layers_per_block, got {list(channels)} and {list(layers_per_block)}"
                )
            self.network = CompactUNet(tuple(channels), tuple(layers_per_block), downscale, output_gain, keyed_grid)
        elif architecture == "paper":
            if len(channels) != 1:
                raise ValueError(f"expected channels of one number for the paper's U-Net ([64]), got {list(channels)}")
            if keyed_grid:
                raise ValueError("expected keyed_grid with the compact architecture, got it with the paper's U-Net")
            self.network = PaperUNet(channels[0])
        else:
            raise ValueError(f"expected architecture {' or '.join(self.architectures)}, got {architecture!r}")

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to height x width that the network takes."""
        minimum = self.minimum_size[self.config.architecture]
        multiple = 256 if self.config.architecture == "paper" else 1
        return tuple(max(minimum, round(side / multiple) * multiple) for side in (height, width))

    def grid_offsets(self, images: torch.Tensor) -> torch.Tensor:
        """How many pixels above and left of each photo (N,3,H,W) in [0,1] its grid of blocks begins: (N,2) integers.

        Which is no secret: an attacker may align photos by it.
        """
        if self.config.architecture == "paper":
            return torch.zeros((len(images), 2), dtype=torch.long, device=images.device)
        return self.network.grid_offsets(images)

    def perturb_at_sizes(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Compute the perturbation with the photos seen at several sizes: resampled to the photos, added, and clipped.

        The sum keeps the power of the strongest of its parts, so that several scales cost no more PSNR than one, and
        no more than `most_power`.

        Args:
            images: (N,3,H,W) in [0,1].
            sizes: heights and widths that the network takes.

        Returns:
            (N,3,H,W) float32 in [-1,1].
        """
        total = torch.zeros(images.shape, device=images.device)
        powers = []
        for size in sizes:
            seen = resize(images, size).clamp(0, 1).to(images.dtype)
            part = resize(self(seen), images.shape[-2:])
            total = total + part
            powers.append(part.square().mean(dim=(1, 2, 3), keepdim=True))
        if len(sizes) > 1:
            # Scaled before it is clipped: what reaches the budget's end stays there, as rounding to levels wants it.
            target = torch.stack(powers).amax(dim=0).clamp(max=self.most_power)
            total = total * _gain(total.detach()[:, :, ::3, ::3], target)
        return total.clamp(-1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the perturbation, before the budget scales it.

        Args:
            images: (N,3,H,W) in [0,1].

        Returns:
            (N,3,H,W) in [-1,1]; sample n depends on photo n alone.

        Raises:
            ValueError: wrong shape, or a size that the network cannot take.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (N,3,H,W), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        minimum = self.minimum_size[self.config.architecture]
        if self.config.architecture == "paper":
            if min(height, width) < minimum or height % 256 or width % 256:
                raise ValueError(
                    f"the paper's U-Net takes heights and widths that are multiples of 256 from {minimum} up, got "
                    f"{height}x{width}; resize the photo, or use the pipeline, which does"
                )
            return self.network(images * 2 - 1)
        if min(height, width) < minimum:
            raise ValueError(f"expected images of at least {minimum}x{minimum} pixels, got {height}x{width}")
        return self.network(images * 2 - 1)
