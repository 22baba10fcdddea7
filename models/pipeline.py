"""Text to pictures: the trained parts together, how they are saved, and how they draw."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.artifact import (
    config_from_dict,
    config_to_dict,
    load_artifact,
    load_weights,
    new_folder,
    write_artifact,
)
from models.autoencoder import Autoencoder, autoencoder_fingerprint, load_autoencoder, save_autoencoder
from models.conditioner import TextCondition
from models.diffusion import DiffusionConfig, network_input, to_velocity
from models.dit import DiT, DiTConfig
from models.errors import ModelError
from models.sampler import guided, sample_flow
from models.text_encoder import Conditioner
from models.time_density import shift_of

_KIND = "text_to_image"
_AUTOENCODER, _TEXT_ENCODERS = "autoencoder", "text_encoders"


class TextToImage(nn.Module):
    """An autoencoder, a DiT and the text encoders that it was trained with.

    Attributes:
        diffusion: The path and what the network predicts; the shift of its times is also the sampler's.
        image_size: Side of a picture in px when none is asked for.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        dit: DiT,
        conditioner: Conditioner,
        diffusion: DiffusionConfig,
        image_size: int,
    ) -> None:
        super().__init__()
        self.autoencoder, self.dit, self.conditioner = autoencoder, dit, conditioner
        self.diffusion, self.image_size = diffusion, image_size
        for ours, theirs, what in (
            (dit.config.latent_channels, autoencoder.config.latent_channels, "latent channels of the autoencoder"),
            (dit.config.text_dim, conditioner.text_dim, "channels of the text encoders"),
            (dit.config.pooled_dim, conditioner.pooled_dim, "pooled channels of the text encoders"),
        ):
            if ours != theirs:
                raise ModelError(f"the DiT was made for {ours}, but there are {theirs} {what}: they do not go together")

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        num_steps: int = 28,
        guidance_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Draws one picture per prompt.

        A picture depends on its own prompt and seed alone: its noise is drawn as diffusers draws it from a list of CPU
        generators, one per picture.

        Args:
            prompts: B texts; "" draws without a condition.
            seeds: B numbers.
            num_steps: Euler steps of the probability-flow ODE, along the path.
            guidance_scale: w; 1 = no guidance, which costs half.
            height: In px; None = image_size.
            width: In px; None = image_size.
            batch_size: Pictures at once.

        Returns:
            (B, 3, height, width) float32 in [0, 1] on the model's device.

        Raises:
            ModelError: Prompts and seeds differ in number, or the size does not fit the model.
        """
        if len(prompts) != len(seeds):
            raise ModelError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
        if batch_size < 1:
            raise ModelError(f"batch_size = {batch_size} must be at least 1")
        height, width = height or self.image_size, width or self.image_size
        multiple = self.autoencoder.config.downsampling * self.dit.config.patch_size
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise ModelError(f"a picture of {width}x{height} px: both sides must be multiples of {multiple}")
        images = [torch.empty(0, 3, height, width, device=self.device)]
        null = self.conditioner.encode([""]).to(self.device)
        for start in range(0, len(prompts), batch_size):
            condition = self.conditioner.encode(prompts[start : start + batch_size]).to(self.device)
            noise = self.noise(seeds[start : start + batch_size], height, width)
            images.append(self.draw(condition, null, noise, num_steps, guidance_scale))
        return torch.cat(images)

    def draw(
        self,
        condition: TextCondition,
        null: TextCondition,
        noise: Tensor,
        num_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """One batch: condition of B, null of 1, noise (B, C, h, w) to pictures (B, 3, H, W) in [0, 1]."""
        predict = guided(self.dit, condition, null, guidance_scale)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            predicted = predict(network_input(self.diffusion, x, t), t)
            return to_velocity(self.diffusion, predicted.float(), x, t)

        shift = self.shift(noise.shape[2], noise.shape[3])
        latents = sample_flow(denoise, noise, num_steps, shift, diffusion=self.diffusion)  # (B, C, h, w)
        return (self.autoencoder.decode(latents).float() * 0.5 + 0.5).clamp(0.0, 1.0)

    def shift(self, height: int, width: int) -> float:
        """The sampler's shift for latents of height x width, as training had it for pictures of that size."""
        return shift_of(self.diffusion, height * width // self.dit.config.patch_size**2)

    def noise(self, seeds: list[int], height: int, width: int) -> Tensor:
        """(B, C, h, w): N(0, I) per picture, from its own seed, on the CPU and then moved."""
        factor = self.autoencoder.config.downsampling
        shape = (1, self.autoencoder.config.latent_channels, height // factor, width // factor)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the autoencoder and the DiT lie; the text encoders may lie elsewhere."""
        return self.autoencoder.latent_mean.device

    def save(self, folder: str | Path) -> str:
        """Writes an artifact of kind "text_to_image" with its frozen parts inside; returns its fingerprint.

        Raises:
            ModelError: The folder exists.
        """
        dit = config_to_dict(self.dit.config)
        if self.dit.config.attention == "joint":
            del dit["attention"]  # fingerprints stay as they were before there was a choice
        config = {
            "dit": dit,
            "diffusion": config_to_dict(self.diffusion),
            "image_size": self.image_size,
        }
        trained_against = {
            _AUTOENCODER: autoencoder_fingerprint(self.autoencoder),
            _TEXT_ENCODERS: self.conditioner.fingerprint,
        }
        with new_folder(folder) as temporary:
            fingerprint = write_artifact(temporary, _KIND, config, self.dit.state_dict(), trained_against)
            save_autoencoder(temporary / _AUTOENCODER, self.autoencoder)
            self.conditioner.save(temporary / _TEXT_ENCODERS)
        return fingerprint

    @classmethod
    def load(cls, folder: str | Path) -> "TextToImage":
        """Reads what `save` wrote, in evaluation mode on the CPU.

        Raises:
            ModelError: A part is missing or damaged, or is not the one that the DiT was trained against.
        """
        folder = Path(folder)
        artifact = load_artifact(folder, _KIND)
        autoencoder, found = load_autoencoder(folder / _AUTOENCODER)
        check_fingerprint(artifact.fingerprints, _AUTOENCODER, found, folder)
        conditioner = Conditioner.load(folder / _TEXT_ENCODERS)
        check_fingerprint(artifact.fingerprints, _TEXT_ENCODERS, conditioner.fingerprint, folder)
        where = str(folder)
        with torch.device("meta"):
            dit = DiT(config_from_dict(DiTConfig, artifact.config.get("dit", {}), where))
        dit.to_empty(device="cpu")
        load_weights(dit, artifact.tensors, where)
        diffusion = config_from_dict(DiffusionConfig, artifact.config.get("diffusion", {}), where)
        image_size = artifact.config.get("image_size")
        if not isinstance(image_size, int):
            raise ModelError(f"{folder}: image_size is {image_size!r}: it was written by another version of darkroom")
        pipeline = cls(autoencoder, dit, conditioner, diffusion, image_size)
        return pipeline.eval().requires_grad_(False)


def check_fingerprint(trained_against: dict[str, str], part: str, found: str, where: Path) -> None:
    """Refuses a frozen part that is not the one the DiT was trained against.

    Raises:
        ModelError: The fingerprints differ.
    """
    expected = trained_against.get(part, "")
    if found != expected:
        raise ModelError(
            f"{where / part} has fingerprint {found[:12]}…, but the DiT was trained against {expected[:12]}…:"
            " put back the one that it was trained with"
        )
