"""Wan2.2's video autoencoder as a stream: pixels to the distribution of latents, latents to pixels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.errors import ReferenceError
from reference.numerics import Numerics
from reference.vae_decoder import Decoder, DecoderPlan
from reference.vae_encoder import Encoder, EncoderPlan
from reference.vae_layers import LATENT_CHANNELS, CausalConv3d, StreamState, pack, unpack

PIXELS_PER_CELL = 16
FRAMES_PER_LATENT = 4
# Per-channel mean and deviation of the latents (bytedance/Lance modeling/vae/wan/vae2_2.py:Wan2_2_VAE).
MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
DEVIATION = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclass(frozen=True)
class Posterior:
    """Normalised mean and raw log-variance of latents, float32 [1, 48, t, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """Latent float32 [t, h, w, 48] for noise of the mean's shape (modeling/vae/wan/model.py:reparameterize)."""
        if eps.shape != self.mean.shape:
            raise ReferenceError(f"the noise has shape {tuple(eps.shape)}, the latent {tuple(self.mean.shape)}")
        latent = eps * torch.exp(0.5 * self.logvar) + self.mean
        return latent[0].movedim(0, -1)

    @classmethod
    def join(cls, parts: "list[Posterior]") -> "Posterior":
        """One posterior of consecutive latent frames."""
        return cls(torch.cat([part.mean for part in parts], 2), torch.cat([part.logvar for part in parts], 2))


class VAE(nn.Module):
    """Encoder (where the checkpoint has one) and decoder; submodules are named as in Wan2.2_VAE.pth."""

    def __init__(self, decoder: DecoderPlan, numerics: Numerics, encoder: EncoderPlan | None = None) -> None:
        super().__init__()
        self.numerics = numerics
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, (1, 1, 1), numerics)
        self.decoder = Decoder(decoder, numerics)
        if encoder is not None:
            self.encoder = Encoder(encoder, numerics)
            self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, (1, 1, 1), numerics)

    def scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation [48] in the policy's dtype; upstream rounds the reciprocal once more."""
        dtype = self.numerics.torch_dtype
        mean, deviation = (torch.tensor(x, dtype=dtype, device=device) for x in (MEAN, DEVIATION))
        return mean, 1.0 / deviation

    @torch.inference_mode()
    def encode_frames(self, pixels: Tensor) -> Iterator[Posterior]:
        """Encode pixels [3, T, 16h, 16w] in [-1, 1]: the posterior of one latent frame at a time.

        The first comes of one frame, the others of four; up to three last frames that make no latent are left out
        (vae2_2.py:WanVAE_.encode). Raises ReferenceError for another shape and for a VAE without an encoder.
        """
        if not hasattr(self, "encoder"):
            raise ReferenceError("this VAE has no encoder; use the complete Wan2.2_VAE.pth")
        channels, frames, height, width = pixels.shape
        if channels != 3 or height % PIXELS_PER_CELL or width % PIXELS_PER_CELL or not pixels.numel():
            raise ReferenceError(f"pixels of shape {tuple(pixels.shape)}: 3 channels, sides multiples of 16 are needed")
        mean, reciprocal = (x.view(-1, 1, 1, 1) for x in self.scale(pixels.device))
        x = pack(pixels[None].to(self.numerics.torch_dtype))
        state = StreamState()
        for index in range((frames - 1) // FRAMES_PER_LATENT + 1):
            last = 1 + FRAMES_PER_LATENT * index
            chunk = x[:, :, max(last - FRAMES_PER_LATENT, 0) : last]
            codes, logvar = self.conv1(self.encoder(chunk, state), state).chunk(2, 1)
            state.chunks += 1
            yield Posterior(((codes - mean) * reciprocal).float(), logvar.float())

    @torch.inference_mode()
    def decode_frames(self, latent: Tensor) -> Iterator[Tensor]:
        """Decode a latent [t, h, w, 48]: one chunk of pixels [3, T, 16h, 16w] a latent frame, float32 in [-1, 1].

        The first chunk is one frame, the others four (vae2_2.py:WanVAE_.decode). Frames to come never matter.
        """
        mean, reciprocal = self.scale(latent.device)
        # Upstream divides by the reciprocal: two roundings in bfloat16.
        z = latent.to(self.numerics.torch_dtype) / reciprocal + mean
        state = StreamState()
        for frame in z.movedim(-1, 0)[None].split(1, 2):
            patches = self.decoder(self.conv2(frame, state), state)
            state.chunks += 1
            yield unpack(patches)[0].float().clamp(-1, 1)
