"""Captions of the world, in the style of DreamBench's prompts.

A caption is a row of pieces ("a photo of", "a small red fox", "wearing a crown", "in the snow"),
drawn as indices on the world's device; tokens are looked up, text is joined for people.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.pretrain.scenes import phrases

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from components.pretrain.world import Scenes

SIZES = ("", "small ", "tiny ", "big ")
PHOTO = ["a photo of"]
OTHER = [
    "a picture of",
    "a rendering of",
    "a rendition of",
    "the photo of",
    "a good photo of",
    "a bright photo of",
    "a dark photo of",
    "a cropped photo of",
    "a photo of my",
    "a nice photo of",
    "a cool photo of",
    "an image of",
]
FAR = [
    "a very small photo of",
    "a far away photo of",
    "a very small picture of",
    "a far away picture of",
]
NEAR = ["a close up of", "a close up photo of", "a zoomed in photo of", "a close up picture of"]
BY_STYLE = {
    "3d": ["a 3d render of", "a 3d render of"],
    "noto": ["a cartoon of", "a drawing of"],
    "twemoji": ["a flat icon of", "a sticker of"],
    "flat": ["a flat icon of", "a sticker of"],
}
NONE = 0  # the empty piece


def with_article(words: str, plural: bool) -> str:
    """Put the article before: a red fox, an owl, grapes."""
    if plural:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class Captioner:
    """All pieces a caption can have, and how they are drawn for a batch of scenes."""

    def __init__(
        self,
        names: list[str],
        plural: list[bool],
        colours: list[str],
        scenes: list[str],
        styles: list[str],
        worn: dict[int, str],
        device: torch.device,
    ) -> None:
        self.device = device
        self.pieces = [""]
        self.n_names, self.n_colours = len(names), len(colours) + 1
        tinted = ["", *(f"{c} " for c in colours)]
        self.subject = self._add(
            with_article(size + tint + name, many)
            for size in SIZES
            for tint in tinted
            for name, many in zip(names, plural, strict=True)
        )
        self.second = self._add(
            "and " + with_article(tint + name, many)
            for tint in tinted
            for name, many in zip(names, plural, strict=True)
        )
        self.photo, self.other = self._group(PHOTO), self._group(OTHER)
        self.far, self.near = self._group(FAR), self._group(NEAR)
        self.far_away = self._add(["far away"])
        by_style = {style: self._group(words) for style, words in BY_STYLE.items()}
        self.style = torch.stack([by_style[s] for s in styles])
        self.worn = torch.zeros(len(styles), dtype=torch.long, device=device)
        for sprite, phrase in worn.items():
            self.worn[sprite] = self._add([f"wearing {phrase}"])
        groups = [self._group(phrases(s)) for s in scenes]
        longest = max(len(g) for g in groups)
        self.scene = torch.stack([g.repeat(longest)[:longest] for g in groups])
        # phrases of one scene are drawn evenly although the rows are padded by repetition
        self.scene_choices = torch.tensor([len(g) for g in groups], device=device)

    def _add(self, words: Iterable[str]) -> int:
        start = len(self.pieces)
        self.pieces += words
        return start

    def _group(self, words: list[str]) -> Tensor:
        start = self._add(words)
        return torch.arange(start, start + len(words), device=self.device)

    def draw(self, scenes: Scenes, gen: torch.Generator) -> Tensor:
        """Pieces [B, 5]: beginning, subject, companion or hat, distance, scene."""
        b, dev = len(scenes), self.device

        def uniform() -> Tensor:
            return torch.rand(b, device=dev, generator=gen)

        def one_of(group: Tensor) -> Tensor:
            return group[(uniform() * len(group)).long()]

        normal, small, close = (scenes.zoom == z for z in range(3))
        style = self.style[scenes.subject]
        style = style.gather(1, (uniform() * style.shape[1]).long()[:, None])[:, 0]
        lot = uniform()
        start = torch.where(
            lot < 0.5,
            one_of(self.photo),
            torch.where(lot < 0.66, style, torch.where(lot < 0.85, one_of(self.other), NONE)),
        )
        start = torch.where(small & (lot > 0.75), one_of(self.far), start)
        start = torch.where(close & (lot < 0.8), one_of(self.near), start)
        lot = uniform()
        word = torch.where(small & (lot < 0.75), torch.where(lot < 0.4, 1, 2), 0)
        word = torch.where(normal & (scenes.size > 0.75) & (lot < 0.4), 3, word)
        subject = self.subject + (word * self.n_colours + scenes.colour + 1) * self.n_names
        second = self.second + (scenes.other_colour + 1) * self.n_names + scenes.other_name
        companion = torch.where(scenes.other >= 0, second, NONE)
        companion = torch.where(scenes.worn >= 0, self.worn[scenes.worn.clamp(min=0)], companion)
        distance = torch.where(small & (lot > 0.75), self.far_away, NONE)
        choice = (uniform() * self.scene_choices[scenes.back_scene]).long()
        scene = self.scene[scenes.back_scene, choice]
        scene = torch.where(uniform() > 0.07, scene, NONE)
        return torch.stack([start, subject + scenes.name, companion, distance, scene], 1)

    def text(self, pieces: Tensor) -> list[str]:
        """The captions as text."""
        return [" ".join(self.pieces[i] for i in row if i) for row in pieces.tolist()]

    def table(self, tokenizer: CLIPTokenizer, more: Iterable[list[int]] = ()) -> TokenTable:
        """Look-up of tokens for the pieces (byte pair encoding never crosses a space).

        `more` are tokens of further pieces, which come behind these.
        """
        ids = [tokenizer(p, add_special_tokens=False).input_ids if p else [] for p in self.pieces]
        return TokenTable([*ids, *more], tokenizer, self.device)


class TokenTable:
    """Token ids of captions, by look-up."""

    def __init__(
        self, ids: list[list[int]], tokenizer: CLIPTokenizer, device: torch.device
    ) -> None:
        width = max(len(i) for i in ids)
        self.tokens = torch.tensor([i + [0] * (width - len(i)) for i in ids], device=device)
        self.lengths = torch.tensor([len(i) for i in ids], device=device)
        self.first, self.last = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.length = tokenizer.model_max_length
        self.width = width

    def __call__(self, pieces: Tensor) -> Tensor:
        """Token ids [B, length], begun, ended and padded as the tokenizer does."""
        lengths = self.lengths[pieces]
        start = 1 + lengths.cumsum(1) - lengths
        step = torch.arange(self.width, device=pieces.device)
        place = torch.where(step < lengths[..., None], start[..., None] + step, self.length)
        place = place.clamp(max=self.length).flatten(1)
        out = torch.full((len(pieces), self.length + 1), self.last, device=pieces.device)
        out.scatter_(1, place, self.tokens[pieces].flatten(1))
        out[:, 0] = self.first
        out[:, self.length - 1 :] = self.last
        return out[:, : self.length]
