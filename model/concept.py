"""What is trained of the networks, stacked along the concept axis N.

A single concept is a pack of one. The modules hold float32 masters only; the frozen networks stay
outside, so that a training engine wraps a few tensors. Call the modules themselves, not their
parts: a ZeRO stage 3 engine gathers parameters when a module is called.
"""

from collections.abc import Sequence

import torch
from torch import nn

from model.base_pair import BasePair
from model.cross_attention import keys_values
from model.errors import InputError
from model.packing import per_row
from model.text import Prompts, encode


class TeacherWeights(nn.Module):
    """The teacher's share: K/V matrices and token rows.

    Attributes:
        kv: [N, C_T, d] float32 parameter, `W_k` and `W_v` of all layers of `T`.
        rows: [N, K, d] float32 parameter, embedding rows of the concepts' K tokens.
    """

    def __init__(self, kv: torch.Tensor, rows: torch.Tensor) -> None:
        """Take start values; they are copied."""
        super().__init__()
        self.kv = nn.Parameter(kv.detach().float().clone())
        self.rows = nn.Parameter(rows.detach().float().clone())

    @classmethod
    def from_pair(cls, pair: BasePair, initializers: Sequence[str]) -> "TeacherWeights":
        """Start N concepts at the base, each with one token that begins as an ordinary word.

        Args:
            pair: the base pair.
            initializers: N words, e.g. `["corgi"]`.

        Raises:
            InputError: for an empty initializer.
        """
        rows = torch.stack([initial_row(pair, word) for word in initializers]).unsqueeze(1)
        return cls(_repeat(pair.teacher_kv, len(initializers)), rows)

    def forward(
        self,
        text_encoder: nn.Module,
        prompts: Prompts | None,
        concept: torch.Tensor,
        text_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts with the concepts' rows and compute the teacher's keys and values.

        Args:
            text_encoder: frozen `tau`.
            prompts: R prompts; may be None when `text_states` are given.
            concept: [R] long, on the CPU.
            text_states: [R, L, d] to use in place of encoding `prompts`.

        Returns:
            text states [R, L, d] and keys and values [R, L, C_T].
        """
        if text_states is None:
            assert prompts is not None, "either prompts or text states"
            text_states = encode(text_encoder, prompts, per_row(self.rows, concept))
        return text_states, keys_values(text_states, self.kv, concept)


class StudentWeights(nn.Module):
    """The student's share: its K/V matrices.

    Attributes:
        kv: [N, C_S, d] float32 parameter, `W_k` and `W_v` of all layers of `S`.
        rows: [N, K, d] float32 parameter, token rows of the student's own; None, as the method has
            it, when it reads the teacher's.
    """

    def __init__(self, kv: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Take start values; they are copied."""
        super().__init__()
        self.kv = nn.Parameter(kv.detach().float().clone())
        self.rows = None if rows is None else nn.Parameter(rows.detach().float().clone())

    @classmethod
    def from_pair(cls, pair: BasePair, n: int) -> "StudentWeights":
        """Start n concepts at the base."""
        return cls(_repeat(pair.student_kv, n))

    def forward(
        self,
        text_encoder: nn.Module,
        prompts: Prompts,
        concept: torch.Tensor,
        text_states: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the student's keys and values.

        Args:
            text_encoder: frozen `tau`.
            prompts: R prompts; read only with token rows of the student's own.
            concept: [R] long, on the CPU.
            text_states: [R, L, d], the prompts as the teacher's token rows make them.

        Returns:
            keys and values [R, L, C_S].
        """
        if self.rows is not None:
            text_states = encode(text_encoder, prompts, per_row(self.rows, concept))
        return keys_values(text_states, self.kv, concept)


def initial_row(pair: BasePair, word: str) -> torch.Tensor:
    """Give the embedding [d] float32 of an ordinary word, the mean over its tokens.

    Raises:
        InputError: when the word has no tokens.
    """
    ids = pair.tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"The initializer {word!r} has no tokens; use an ordinary word.")
    table = pair.text_encoder.get_input_embeddings().weight
    return table[torch.tensor(ids, device=table.device)].detach().float().mean(dim=0)


def _repeat(weight: torch.Tensor, n: int) -> torch.Tensor:
    return weight.unsqueeze(0).repeat(n, 1, 1)
