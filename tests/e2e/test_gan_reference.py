"""The adversarial stage against plain torch in one process: no DeepSpeed, no DDP, no fragments, float32 throughout.

The reference reads the same samples from the loader and writes the losses out by their formulas.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.loader import build_loader
from models.autoencoder import Autoencoder
from models.discriminator import Discriminator
from tests.helpers import tiny
from tests.helpers.command import write_recipe
from tests.helpers.runs import curve, distance, tensors
from tests.helpers.warm_ranks import darkroom
from training.config import AutoencoderRecipe
from training.diffusion_step import posterior_noise
from training.optim import OptimConfig

STEPS = 5
# Adam divides by the root of the second moment plus eps: with a small eps, gradients that are nothing but rounding
# would make steps of the learning rate's size, in any direction. With this one a step is a bounded function of them.
OPTIM = OptimConfig(learning_rate=1e-3, eps=1e-3)


def recipe_of(world, **loss) -> AutoencoderRecipe:
    recipe = tiny.autoencoder_recipe(world.data, total_steps=STEPS, optim=OPTIM, discriminator_optim=OPTIM)
    return replace(
        recipe, loss=replace(recipe.loss, disc_start_step=1, **loss), engine=replace(recipe.engine, max_grad_norm=0.05)
    )


def losses_of(recipe, generator, discriminator, batch, step):
    """The generator's loss and the discriminator's of one batch, with gradients, and what a row says of them."""
    images, numbers = batch
    decoded, mean, logvar = generator(images, posterior_noise(generator, images, numbers, recipe.seed))
    rec = (decoded - images).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / images.numel()
    loss = rec + recipe.loss.kl_weight * kl
    row = {"rec_loss": rec, "kl": kl}
    disc_loss = None
    if step >= recipe.loss.disc_start_step:
        adv = -discriminator(decoded).mean()
        last = generator.last_conv.weight
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (rec, adv)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(max=recipe.loss.max_adaptive_weight)  # Esser et al. 2021, Eq. 7
        weight = weight.detach() * recipe.loss.adversarial_weight
        loss = loss + weight * adv
        fake, real = discriminator(decoded.detach()), discriminator(images)
        disc_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        row |= {"adv_g": adv, "adaptive_weight": weight, "disc_loss": disc_loss}
    return loss, disc_loss, {key: float(value.detach()) for key, value in (row | {"loss": loss}).items()}


def reference(recipe, one_batch: bool):
    """Trains; a step's micro-batches one by one, or as one batch. Returns rows, and tensors as a commit has them."""
    generator, discriminator = Autoencoder(recipe.model), Discriminator(recipe.discriminator)
    generator.init_weights(recipe.seed)
    discriminator.init_weights(recipe.seed + 1)
    adams = [
        torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)
        for model in (generator, discriminator)
    ]
    average = {name: parameter.detach().clone() for name, parameter in generator.named_parameters()}
    micro, count = recipe.engine.micro_batch_size, recipe.engine.global_batch_size // recipe.engine.micro_batch_size
    loader = iter(build_loader(recipe.data, seed=recipe.seed, micro_batch_size=micro, rank=0, world_size=1))
    rows = []
    for step in range(STEPS):
        batches = [(batch.images(), batch.sample_numbers) for batch in (next(loader) for _ in range(count))]
        if one_batch:
            batches = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
        sums = [[torch.zeros_like(p) for p in model.parameters()] for model in (generator, discriminator)]
        found = []
        for batch in batches:
            loss, disc_loss, row = losses_of(recipe, generator, discriminator, batch, step)
            found.append(row)
            for model, part, total in ((generator, loss, sums[0]), (discriminator, disc_loss, sums[1])):
                if part is not None:
                    gradients = torch.autograd.grad(part, list(model.parameters()), retain_graph=True)
                    torch._foreach_add_(total, gradients, alpha=1 / len(batches))
        norm = torch.stack([gradient.norm() for gradient in sums[0]]).norm()
        scale = min(1.0, recipe.engine.max_grad_norm / (float(norm) + 1e-6))
        for model, total, adam, times in ((generator, sums[0], adams[0], scale), (discriminator, sums[1], adams[1], 1)):
            if model is discriminator and step < recipe.loss.disc_start_step:
                continue
            for parameter, gradient in zip(model.parameters(), total, strict=True):
                parameter.grad = gradient * times
            adam.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in generator.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
        rows.append({key: sum(row[key] for row in found) / len(found) for key in found[0]} | {"grad_norm": float(norm)})
    groups = {"model": dict(generator.named_parameters()), "ema-0.9": average}
    for prefix, model, adam in (("", generator, adams[0]), ("discriminator-", discriminator, adams[1])):
        for moment in ("exp_avg", "exp_avg_sq"):
            groups[prefix + moment] = {name: adam.state[p][moment] for name, p in model.named_parameters()}
    groups["discriminator-weights"] = dict(discriminator.named_parameters())
    return rows, {group: {name: t.detach() for name, t in found.items()} for group, found in groups.items()}


def check(recipe, run, stage, ranks, expected):
    result = darkroom(
        *("train", "autoencoder", write_recipe(run.with_suffix(".yaml"), "autoencoder", recipe)),
        *("--run", run, "--nproc", ranks, f"engine.zero_stage={stage}"),
    )
    assert result.code == 0, result.err
    rows, groups = expected
    for mine, theirs in zip(curve(run), rows, strict=True):
        known = {key: value for key, value in theirs.items() if mine[key] is not None}  # stage 0 may not say the norm
        assert {key: mine[key] for key in known} == pytest.approx(known, rel=2e-5, abs=1e-7)
    mine = tensors(run, STEPS)
    far = distance({group: {name: mine[group][name] for name in found} for group, found in groups.items()}, groups)
    assert set(far) == set(mine)
    return far


@pytest.fixture(scope="module")
def micro_batches(world):
    recipe = recipe_of(world)
    rows, groups = reference(recipe, one_batch=False)
    assert rows[0]["grad_norm"] > recipe.engine.max_grad_norm  # or clipping would not be in the comparison
    return recipe, (rows, groups)


@pytest.fixture(scope="module")
def big_batches(world):
    """λ is a function of its micro-batch; clamped, it is the same for all, and the batch may be cut anywhere."""
    recipe = recipe_of(world, max_adaptive_weight=1e-3)
    return recipe, reference(recipe, one_batch=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_plain_torch(micro_batches, tmp_path, stage):
    recipe, expected = micro_batches
    far = check(recipe, tmp_path / "run", stage, 2, expected)
    assert max(far.values()) < 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_accumulated_micro_batches_train_as_one_big_batch(big_batches, tmp_path, stage):
    recipe, expected = big_batches
    far = check(recipe, tmp_path / "run", stage, 1, expected)
    assert max(far.values()) < 1e-4
