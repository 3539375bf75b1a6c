"""CLIP-I, DINO and CLIP-T (METHOD.md "Metrics"), over features of whatever models are loaded.

Numbers of different feature models must never be compared; a report names the models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from model.base_pair import freeze, load_part, load_tokenizer


def mean_cosine(generated: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Average each picture's cosine to every reference: [G, d], [F, d] -> [G]."""
    cosine = F.normalize(generated, dim=-1) @ F.normalize(references, dim=-1).T
    return cosine.mean(dim=1)


def clip_i(generated: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """CLIP-I of each picture: CLIP image embeddings [G, e] against the references' [F, e]: [G]."""
    return mean_cosine(generated, references)


def dino(generated: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """DINO of each picture: CLS features [G, d] against the references' [F, d]: [G]."""
    return mean_cosine(generated, references)


def clip_t(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP-T of each picture with its own prompt's text: embeddings [G, e] each: [G]."""
    return F.cosine_similarity(images, texts, dim=-1)


def without_token(prompt: str, tokens: Sequence[str]) -> str:
    """Take the concept's tokens out of a prompt: "a <new1> dog" becomes "a dog"."""
    for token in tokens:
        prompt = prompt.replace(token, " ")
    return " ".join(prompt.split())


@dataclass(frozen=True, eq=False)
class ClipText:
    """CLIP's text tower, frozen.

    Attributes:
        network: CLIPTextModelWithProjection.
        tokenizer: its tokenizer.
    """

    network: nn.Module
    tokenizer: Any

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: [R, e] float32."""
        length = min(self.tokenizer.model_max_length, self._positions())
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids = encoded["input_ids"].to(next(self.network.parameters()).device)
        return self.network(input_ids=ids).text_embeds.float()

    def _positions(self) -> int:
        config: Any = self.network.config
        return config.max_position_embeddings


def load_clip_text(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ClipText:
    """Load the text tower and tokenizer of a local CLIPModel directory.

    Raises:
        InputError: when the directory is not whole.
    """
    directory = Path(directory)
    network = load_part(CLIPTextModelWithProjection, directory)
    return ClipText(freeze(network).to(device, dtype), load_tokenizer(directory))
