"""One picture per held-out prompt, from a seed that belongs to the prompt's number."""

from torch import Tensor

from eval.config import EvalRecipe
from eval.pictures import to_pictures
from models.pipeline import TextToImage


def generate_pictures(pipeline: TextToImage, prompts: list[str], recipe: EvalRecipe) -> Tensor:
    """Draws the prompts as the recipe says.

    Picture i starts from seed + i, so the result depends neither on the batch size (up to rounding) nor on how the
    prompts are shared out.

    Returns:
        (B, 3, H, W) uint8, as they would be saved.
    """
    seeds = [recipe.seed + number for number in range(len(prompts))]
    images = pipeline.generate(
        prompts,
        seeds,
        num_steps=recipe.num_steps,
        guidance_scale=recipe.guidance_scale,
        batch_size=recipe.batch_size,
    )  # (B, 3, H, W) in [0, 1]
    return to_pictures(images * 2 - 1)
