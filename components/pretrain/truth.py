"""What a perfect picture of a sample concept would be: true renders in scenes for new prompts."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from components.pretrain.evaluate import grid
from components.pretrain.export import REFERENCE_SCENES
from components.pretrain.scenes import phrases
from components.pretrain.subjects import SAMPLE_CONCEPTS
from components.pretrain.training import write_text
from components.pretrain.world import NORMAL, World

# None is behind a reference picture. Spread, so that the first few differ as much as all.
SCENES = (
    "beach", "snow", "forest", "city", "fabric", "mountain", "desert", "cobble", "leaves", "brick",
)  # fmt: skip
RENDERS = 2


def write_truth(world: World, out: Path) -> None:
    """Write one sheet a concept, a column a scene and a row a render, and the scenes' prompts."""
    assert not set(SCENES) & set(REFERENCE_SCENES)
    out.mkdir(parents=True, exist_ok=True)
    for index, (name, (style, emoji, _, _)) in enumerate(SAMPLE_CONCEPTS.items()):
        gen = world.generator(2000 + index)
        subject = torch.tensor([world.sprite(style, emoji)]).repeat(RENDERS)
        columns = []
        for scene in SCENES:
            scenes = world.sample(
                RENDERS, gen, subject=subject, scene=scene, alone=True, zoom=NORMAL
            )
            columns.append(world.render(scenes)[0])
        sheet = grid(torch.stack(columns, dim=1).flatten(0, 1), len(SCENES))
        sheet.save(out / f"{name}.webp", quality=90, method=6)
    prompts = [f"a {{}} {phrases(scene)[0]}" for scene in SCENES]
    write_text(out / "prompts.yaml", yaml.safe_dump(prompts, width=100))
