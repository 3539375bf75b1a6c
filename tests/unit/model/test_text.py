"""Concept tokens: rows put in from outside against a tokenizer and table that really grew."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from model.base_pair import BasePair
from model.concept import TeacherWeights, initial_row
from model.errors import InputError
from model.names import TOKEN_PATTERN
from model.text import check_length, encode, tokenize

TOKENS = ("<new1>", "<new2>")


def grown(pair: BasePair, rows: torch.Tensor) -> tuple[object, torch.nn.Module]:
    """A tokenizer and text encoder extended the usual way, by resize_token_embeddings."""
    tokenizer, encoder = copy.deepcopy(pair.tokenizer), copy.deepcopy(pair.text_encoder)
    tokenizer.add_tokens(list(TOKENS))
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table.data[-2:] = rows
    return tokenizer, encoder


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a <new1> dog",
        "<new1>dog on the beach",
        "the <new2> and <new1> <new1>",
        "a photo of a dog",
        "",
        "a " * 30 + "<new1>",  # cut off before the token
    ],
)
def test_rows_equal_a_grown_tokenizer_and_table(pair: BasePair, text: str) -> None:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    tokenizer, encoder = grown(pair, rows)
    ids = tokenizer(
        [text], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    ).input_ids
    expected = encoder(input_ids=ids).last_hidden_state
    prompts = tokenize(pair.tokenizer, [text], TOKENS)
    assert prompts.ids.shape == prompts.slots.shape == (1, 16)
    mine = encode(pair.text_encoder, prompts, rows[None])
    assert torch.allclose(mine, expected, atol=1e-6)


def test_a_prompt_that_would_be_cut_off_is_refused(pair: BasePair) -> None:
    check_length(pair.tokenizer, "dog " * 14)
    with pytest.raises(InputError, match="16 tokens, of which this base reads 14"):
        check_length(pair.tokenizer, "dog " * 16)
    # A concept's token takes one place, however it is spelled.
    check_length(pair.tokenizer, "<new1> " + "dog " * 13, ["<new1>"])
    with pytest.raises(InputError, match="15 tokens"):
        check_length(pair.tokenizer, "<new1> <new2> " + "dog " * 13, TOKENS)


def test_each_row_of_a_batch_uses_its_own_concept(pair: BasePair) -> None:
    prompts = tokenize(pair.tokenizer, ["a <new1> dog"] * 2, ["<new1>"])
    rows = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))
    together = encode(pair.text_encoder, prompts, rows)
    alone = tokenize(pair.tokenizer, ["a <new1> dog"], ["<new1>"])
    for r in range(2):
        assert torch.allclose(together[r], encode(pair.text_encoder, alone, rows[r : r + 1])[0])
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_gradient_reaches_the_rows_and_nothing_else(pair: BasePair) -> None:
    rows = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    prompts = tokenize(pair.tokenizer, ["a <new1> dog", "a dog"], TOKENS)
    encode(pair.text_encoder, prompts, rows).square().sum().backward()
    assert rows.grad is not None
    assert rows.grad[0, 0].abs().sum() > 0
    assert rows.grad[0, 1].abs().sum() == 0  # <new2> is in no prompt
    assert rows.grad[1].abs().sum() == 0  # the second prompt holds no token
    assert all(p.grad is None for p in pair.text_encoder.parameters())


def test_the_tokenizer_and_the_encoder_stay_as_they_were(pair: BasePair) -> None:
    size = len(pair.tokenizer)
    plain = tokenize(pair.tokenizer, ["a <new1> dog"])
    before = encode(pair.text_encoder, plain)
    prompts = tokenize(pair.tokenizer, ["a <new1> dog"], ["<new1>"])
    encode(pair.text_encoder, prompts, torch.ones(1, 1, 32))
    assert len(pair.tokenizer) == size
    assert not pair.text_encoder.get_input_embeddings()._forward_hooks
    assert torch.equal(encode(pair.text_encoder, plain), before)
    assert (plain.slots == -1).all() and (prompts.slots == 0).sum() == 1


def test_threads_do_not_meet_each_others_rows(pair: BasePair) -> None:
    prompts = tokenize(pair.tokenizer, ["a <new1> dog"], ["<new1>"])
    rows = torch.randn(8, 1, 1, 32, generator=torch.Generator().manual_seed(3))
    expected = [encode(pair.text_encoder, prompts, r) for r in rows]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(5):
            if not torch.equal(encode(pair.text_encoder, prompts, rows[n]), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_initializers_give_the_first_rows(pair: BasePair) -> None:
    table = pair.text_encoder.get_input_embeddings().weight
    dog = pair.tokenizer.convert_tokens_to_ids("dog</w>")
    weights = TeacherWeights.from_pair(pair, ["dog", "dog cat"])
    assert torch.equal(weights.rows[0, 0], table[dog])
    cat = pair.tokenizer.convert_tokens_to_ids("cat</w>")
    assert torch.allclose(weights.rows[1, 0], (table[dog] + table[cat]) / 2)
    # An own copy, not a view of the table: else a saved row would hold the whole table.
    row = initial_row(pair, "dog")
    assert row.untyped_storage().nbytes() == row.numel() * 4
    with pytest.raises(InputError, match="has no tokens"):
        initial_row(pair, " ")


@pytest.mark.parametrize("token", ["<new1>", "<my-dog_2>", "<A>"])
def test_token_strings_that_are_allowed(token: str) -> None:
    assert TOKEN_PATTERN.fullmatch(token)


@pytest.mark.parametrize("token", ["new1", "<>", "<../x>", "<new 1>", "<|endoftext|>", "<a>\n"])
def test_token_strings_that_are_not(token: str) -> None:
    assert not TOKEN_PATTERN.fullmatch(token)
