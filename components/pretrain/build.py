"""build-world: packages -> sprites, scenes and tokenizer files in one folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from PIL import Image

from components.pretrain import assets, scenes
from components.pretrain.networks import TEXT_LENGTH, VOCABULARY
from components.pretrain.painting import SCENE_PX


def build_world(out: Path, downloads: Path, seed: int = 0) -> None:
    """Write sprites.png, scenes.*.jpg, world.json and tokenizer/ into `out`.

    Needs npm and pip once (the packages stay in `downloads`), and the package `resvg_py`.
    """
    archives = assets.fetch(downloads)
    out.mkdir(parents=True, exist_ok=True)
    sprites, facts = assets.render_sprites(assets.SpriteSource(archives))
    Image.fromarray(sprites.reshape(-1, assets.SPRITE_PX, 4)).save(out / "sprites.png")
    pictures, names = scenes.paint_all(seed)
    for part, start in enumerate(range(0, len(pictures), 400)):  # JPEG ends at 65,500 rows
        sheet = pictures[start : start + 400].reshape(-1, SCENE_PX, 3)
        Image.fromarray(sheet).save(out / f"scenes.{part}.jpg", quality=90, subsampling=0)
    (out / "world.json").write_text(json.dumps({"sprites": facts, "scenes": names}))
    write_tokenizer(out / "tokenizer", assets.read_member(archives["bpe"], "16e6.txt.gz"))


def write_tokenizer(out: Path, bpe: bytes) -> None:
    """CLIP's byte pair encoding cut to its first `VOCABULARY` tokens, as tokenizer files."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [letter + "</w>" for letter in letters]
    merges = gzip.decompress(bpe).decode().split("\n")[1 : VOCABULARY - 2 - len(words) + 1]
    words += ["".join(m.split()) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    if len(set(words)) != VOCABULARY:
        raise ValueError(f"The byte pair file gives {len(set(words))} tokens, not {VOCABULARY}.")
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(m.split()) for m in merges],
        model_max_length=TEXT_LENGTH,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(out)
