"""Measure the pair and draw grids for a person to judge."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from components.pretrain.captions import with_article
from components.pretrain.pair import Painter, Pair
from components.pretrain.subjects import PLURAL
from components.pretrain.world import NORMAL, World

PROMPTS = [
    "a photo of a dog on the beach",
    "a photo of a red car in the snow",
    "a 3d render of a cat in a grassy field",
    "a photo of a penguin in the desert",
    "a close up of a lion in the city",
    "a small elephant far away in the snow",
    "a cartoon of a fox on a wooden floor",
    "a photo of a blue teapot on a purple rug",
    "a photo of a backpack in the jungle",
    "a photo of a robot in space",
    "a photo of a green frog on a cobblestone street",
    "a dog wearing a top hat in the snow",
    "a cat wearing a crown on pink fabric",
    "a photo of a cat and a dog on the beach",
    "a flat icon of a rocket on a yellow background",
    "a photo of a pink elephant under water",
    "a photo of a teddy bear with a mountain in the background",
    "a photo of a shoe in front of a brick wall",
    "a photo of an owl at night",
    "a photo of a clock on autumn leaves",
    "a photo of a white horse in a wheat field",
    "a photo of a pizza on a checkered floor",
    "a photo of a duck in the rain",
    "a photo of a banana with the eiffel tower in the background",
]
COLUMNS = 12


def samples(painter: Painter, seed: int = 1) -> Image.Image:
    """Grid of PROMPTS: teacher (25 steps), student in one step (two rows each)."""
    return grid(torch.cat([painter.teach(PROMPTS, seed), painter.draw(PROMPTS, seed)]), COLUMNS)


def unseen(
    painter: Painter, world: World, count: int = 40, seed: int = 7
) -> tuple[list[str], dict[str, Image.Image]]:
    """Pictures of the student in one step for captions drawn by lot, and what to hold them against.

    Args:
        painter: the pair.
        world: with `drawn="unseen"`: subjects in scenes where the pair never saw them.
        count: pictures.
        seed: of captions and noise.

    Returns:
        (the captions in reading order; grids of the pictures, of the teacher's in 25 steps and of
        the true renders, by what the name of their file has after its stem).
    """
    gen = world.generator(seed)
    scenes = world.sample(2 * count, gen, alone=True, zoom=NORMAL)
    pieces = world.captions(scenes, gen)
    named = pieces[:, -1] > 0  # the scene is named
    captions = world.captioner.text(pieces[named][:count])
    pictures = {
        "": painter.draw(captions, seed),
        "-teacher": painter.teach(captions, seed),
        "-truth": world.render(scenes)[0][named][:count],
    }
    return captions, {name: grid(each, 10) for name, each in pictures.items()}


@torch.no_grad()
def measure(
    painter: Painter, clip: Any, world: World, count: int = 96, seed: int = 99
) -> dict[str, float]:
    """Text agreement on fresh compositions (with their true renders), variety, the VAE's PSNR.

    Agreement is in the style of CLIP-T: cosine of the pair's own CLIP, mean over compositions;
    "shuffled" pairs each render with another composition's caption. Variety is how far two pictures
    of one caption are apart: one less the cosine of their features.

    Args:
        painter: the pair.
        clip: its CLIPModel.
        world: draws the compositions.
        count: compositions.
        seed: of compositions and noise.
    """
    clip, gen = clip.to(painter.device), world.generator(seed)
    scenes = world.sample(count, gen)
    captions = world.captioner.text(world.captions(scenes, gen))
    truth = world.render(scenes)[0]

    def see(x: Tensor) -> Tensor:
        seen = clip.vision_model(pixel_values=x).pooler_output
        return F.normalize(clip.visual_projection(seen), dim=-1)

    read = clip.text_model(input_ids=painter.ids(captions)).pooler_output
    text = F.normalize(clip.text_projection(read), dim=-1)
    back = painter.decode(painter.vae.encode(truth).latent_dist.mean)
    error = (back - truth).square().mean((1, 2, 3))
    drawers: dict[str, Callable[[int], Tensor]] = {
        "teacher": lambda seed: painter.teach(captions, seed),
        "student": lambda seed: painter.draw(captions, seed),
        "student_4_steps": lambda seed: painter.draw(captions, seed, 4),
    }
    drawn = {name: see(draw(seed)) for name, draw in drawers.items()}
    seen = {"truth": see(truth), "vae": see(back), **drawn}
    out = {f"text_{k}": float((v * text).sum(1).mean()) for k, v in seen.items()}
    out["text_shuffled"] = float((seen["truth"] * text.roll(1, 0)).sum(1).mean())
    for name, draw in drawers.items():
        out[f"variety_{name}"] = float(1 - (drawn[name] * see(draw(seed + 1))).sum(1).mean())
    out["vae_psnr"] = float((10 * torch.log10(4 / error)).mean())
    return out


@torch.no_grad()
def naming(
    painter: Painter, clip: Any, world: World, count: int, seed: int = 0
) -> dict[str, float]:
    """How often CLIP names what a true render on grass shows, among all names of the world.

    Args:
        painter: the pair.
        clip: its CLIPModel.
        world: with the subjects that were seen, or with those that were held out.
        count: renders, in their own colours.
        seed: of the renders.

    Returns:
        top1 and top5: shares of renders whose own name is the first, or among the first five.
    """
    clip = clip.to(painter.device)
    scenes = world.sample(count, world.generator(seed), scene="grass", alone=True, zoom=NORMAL)
    scenes.colour = torch.full_like(scenes.colour, -1)
    seen = clip.vision_model(pixel_values=world.render(scenes)[0]).pooler_output
    captions = [f"a photo of {with_article(n, n in PLURAL)} in the grass" for n in world.names]
    read = clip.text_model(input_ids=painter.ids(captions)).pooler_output
    pictures = F.normalize(clip.visual_projection(seen), dim=-1)
    best = (pictures @ F.normalize(clip.text_projection(read), dim=-1).T).topk(5).indices
    right = best == scenes.name[:, None]
    return {"top1": float(right[:, 0].float().mean()), "top5": float(right.any(1).float().mean())}


def parameters(pair: Pair) -> dict[str, int]:
    """Parameters of each network that has weights of its own."""
    return {
        f"parameters_{name}": sum(p.numel() for p in net.parameters())
        for name, net in pair.networks().items()
    }


@torch.no_grad()
def latency(painter: Painter, rounds: int = 15) -> dict[str, float]:
    """Median seconds of the parts of one picture: text, one step, decoding, and all together."""
    prompts, noise = PROMPTS[:1], painter.noise(1, 0)
    text = painter.read(prompts)
    z = painter.imagine(text, noise, 1)
    parts: dict[str, Callable[[], Tensor]] = {
        "text": lambda: painter.read(prompts),
        "one_step": lambda: painter.imagine(text, noise, 1),
        "decode": lambda: painter.decode(z),
        "picture_1_step": lambda: painter.draw(prompts, 0),
        "picture_4_steps": lambda: painter.draw(prompts, 0, 4),
        "picture_teacher_25_steps": lambda: painter.teach(prompts, 0),
    }
    return {f"seconds_{name}": _median(part, rounds, painter) for name, part in parts.items()}


def _median(part: Callable[[], Tensor], rounds: int, painter: Painter) -> float:
    """Median seconds of a call, after two that do not count."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        part()
        if painter.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return round(statistics.median(seconds[2:]), 4)


def grid(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures [B, 3, H, W] in [-1, 1] side by side."""
    b, _, h, w = pictures.shape
    rows = -(-b // columns)
    sheet = torch.ones(rows * columns, 3, h, w)
    sheet[:b] = pictures.float().cpu()
    sheet = sheet.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2)
    values = ((sheet.reshape(rows * h, columns * w, 3) + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(values.to(torch.uint8).numpy())
