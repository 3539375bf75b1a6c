"""Prompts with concept tokens, and their encoding by the frozen text encoder.

A concept's token (e.g. `<new1>`) has no row in the text encoder's table. Its embedding rows are
parameters of the concept, put in place of the table's output, so nothing else can move.
"""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from model.errors import InputError

_lock = threading.RLock()
_with_tokens: "WeakKeyDictionary[Any, dict[tuple[str, ...], Any]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts.

    Attributes:
        ids: [R, L] long; table indices. A concept token's place holds 0, which is not looked at.
        slots: [R, L] long; -1 for an ordinary token, k for the k-th row of the row's concept.
    """

    ids: torch.Tensor
    slots: torch.Tensor

    def __len__(self) -> int:
        """Give the number of prompts R."""
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "Prompts":
        """Copy to a device."""
        return Prompts(self.ids.to(device), self.slots.to(device))


def tokenize(tokenizer: Any, texts: Sequence[str], token_strings: Sequence[str] = ()) -> Prompts:
    """Tokenize prompts, padded and truncated to the tokenizer's `model_max_length`.

    Args:
        tokenizer: the base pair's CLIP tokenizer; it is not changed.
        texts: R prompts.
        token_strings: the concept's tokens, e.g. `["<new1>"]`; the k-th one fills slot k. With
            none, text that looks like a token is ordinary text.
    """
    extended = _extended(tokenizer, tuple(token_strings))
    encoded = extended(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    ids: torch.Tensor = encoded["input_ids"]
    slots = torch.full_like(ids, -1)
    for k, string in enumerate(token_strings):
        slots[ids == extended.convert_tokens_to_ids(string)] = k
    return Prompts(ids.masked_fill(slots >= 0, 0), slots)


def check_length(tokenizer: Any, text: str, token_strings: Sequence[str] = ()) -> None:
    """Refuse a prompt that the text encoder would not read to its end.

    Args:
        tokenizer: the base pair's CLIP tokenizer; it is not changed.
        text: the prompt.
        token_strings: the concept's tokens; each takes one place, however it is spelled.

    Raises:
        InputError: when `tokenize` would cut it off.
    """
    for token in token_strings:
        text = text.replace(token, " a ")
    most = int(tokenizer.model_max_length) - 2  # without start and end
    count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if count > most:
        raise InputError(
            f"The prompt has {count} tokens, of which this base reads {most}; shorten it."
        )


def cat(prompts: Sequence[Prompts]) -> Prompts:
    """Join tokenized prompts row by row."""
    return Prompts(torch.cat([p.ids for p in prompts]), torch.cat([p.slots for p in prompts]))


def encode(
    text_encoder: nn.Module, prompts: Prompts, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Encode prompts to text states, the encoder's last hidden state [R, L, d].

    Args:
        text_encoder: a CLIPTextModel.
        prompts: R tokenized prompts, on any device.
        rows: [R, n_tokens, d] embedding rows of each prompt's concept, or None when no prompt
            holds a concept token. Gradient flows to them.
    """
    table: Any = text_encoder.get_input_embeddings()  # type: ignore[operator]
    device = table.weight.device
    ids, slots = prompts.ids.to(device), prompts.slots.to(device)
    if rows is None:
        with _lock:
            return text_encoder(input_ids=ids).last_hidden_state
    index = slots.clamp_min(0).unsqueeze(-1).expand(-1, -1, rows.shape[-1])
    own = rows.to(device).gather(1, index)

    def put_rows(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((slots >= 0).unsqueeze(-1), own.to(output.dtype), output)

    with _lock:  # the hook is on the shared module: another thread's prompts must not meet it
        handle = table.register_forward_hook(put_rows)
        try:
            return text_encoder(input_ids=ids).last_hidden_state
        finally:
            handle.remove()


def _extended(tokenizer: Any, tokens: tuple[str, ...]) -> Any:
    """Give a cached copy of the tokenizer that knows `tokens`."""
    if not tokens:
        return tokenizer
    with _lock:
        copies = _with_tokens.setdefault(tokenizer, {})
        if tokens not in copies:
            extended = copy.deepcopy(tokenizer)
            extended.add_tokens(list(tokens))
            copies[tokens] = extended
        return copies[tokens]
