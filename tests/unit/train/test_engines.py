"""Engines at every ZeRO stage and world size do the same sums, and hand their state on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from components.spec import TrainSpec
from tests.unit.train.ranks import on_ranks

N, C, D, BATCH = 3, 50, 7, 4
SCALES = torch.tensor([1.0, 10.0, 1e-3])  # one concept far over the clip norm, one far under
CLIP = 1.0
STAGES = (0, 1, 2, 3)


class Stacked(nn.Module):
    """Stacked parameters of sizes that two ranks do not divide."""

    def __init__(self, values: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.kv = nn.Parameter(torch.randn(N, C, D, generator=gen))
        self.rows = nn.Parameter(torch.randn(N, 1, D, generator=gen))
        self.bias = nn.Parameter(torch.randn(N, 1, generator=gen))
        if values:
            for name, parameter in self.named_parameters():
                parameter.data.copy_(values[name])

    def forward(self, x: torch.Tensor, concept: torch.Tensor) -> torch.Tensor:
        out = torch.einsum("rld,rcd->rlc", x, self.kv[concept])
        return out + (self.rows[concept] * x).sum(-1, keepdim=True) + self.bias[concept][:, None]


def loss_of(module: Any, step: int, broken: int | None = None) -> torch.Tensor:
    """Sum over concepts of the mean over the global batch's own rows of this rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gen = torch.Generator().manual_seed(100 + step)
    x = torch.randn(N, BATCH, 5, D, generator=gen) * SCALES[:, None, None, None]
    per = BATCH // world
    mine = x[:, rank * per : (rank + 1) * per].reshape(N * per, 5, D)
    concept = torch.arange(N).repeat_interleave(per)
    losses = module(mine, concept).square().mean((1, 2)).view(N, per).mean(1)
    if broken is not None:
        losses = losses * torch.where(torch.arange(N) == broken, torch.nan, 1.0)
    return losses.sum()


def settings_of(stage: int, optimizer: str) -> TrainSpec:
    return TrainSpec(zero_stage=stage, optimizer=optimizer, weight_decay=1e-2)


def steps(engine: Any, first: int, last: int, broken: int | None = None) -> dict[str, Any]:
    from components.train.engines import clip_per_concept, gradients

    norms = clipped = {}
    for step in range(first, last):
        engine.backward(loss_of(engine, step, broken))
        norms = clip_per_concept(engine, CLIP).clone()
        clipped = gradients(engine)
        engine.step()
    return {"norms": norms, "clipped": clipped}


def five_steps() -> dict[str, Any]:
    """Every stage and optimizer, then a broken concept, in one process."""
    from components.train.engines import free, make_engine, read_state

    rates = {"": 1e-2, "rows": 5e-2}
    out: dict[str, Any] = {}
    for stage in STAGES:
        for optimizer in ("adamw", "sgd"):
            engine = make_engine(Stacked(), rates, settings_of(stage, optimizer), 0, {})
            result = steps(engine, 0, 5)
            out[f"{stage}.{optimizer}"] = {**result, "state": read_state(engine)}
            free(engine)
        engine = make_engine(Stacked(), rates, settings_of(stage, "sgd"), 0, {})
        out[f"{stage}.broken"] = {**steps(engine, 0, 1, broken=1), "state": read_state(engine)}
        free(engine)
    return out


def two_and_three_steps(start: dict[str, Any] | None) -> dict[str, Any]:
    """Two steps at each stage; or three more at each stage from every stage's state."""
    from components.train.engines import free, make_engine, read_state

    rates = {"": 1e-2, "rows": 5e-2}
    out: dict[str, Any] = {}
    for stage in STAGES:
        sources = {"": {}} if start is None else start
        for source, state in sources.items():
            module = Stacked(state)
            done = 2 if state else 0
            engine = make_engine(module, rates, settings_of(stage, "adamw"), done, state)
            steps(engine, done, 5 if state else 2)
            out[f"{source}{stage}"] = read_state(engine)
            free(engine)
    return out


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    return {world: on_ranks(world, five_steps) for world in (1, 2)}


def plain_torch(optimizer: str) -> nn.Module:
    """The reference: a loop over concepts, one optimizer each, no DeepSpeed."""
    module = Stacked()
    for n in range(N):
        own = [nn.Parameter(parameter.detach()[n].clone()) for parameter in module.parameters()]
        groups = [
            {"params": [p], "lr": 5e-2 if name == "rows" else 1e-2}
            for (name, _), p in zip(module.named_parameters(), own, strict=True)
        ]
        kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
        stepper = kind(groups, weight_decay=1e-2)
        for step in range(5):
            gen = torch.Generator().manual_seed(100 + step)
            x = (torch.randn(N, BATCH, 5, D, generator=gen) * SCALES[:, None, None, None])[n]
            kv, rows, bias = own
            out = x @ kv.T + (rows * x).sum(-1, keepdim=True) + bias
            stepper.zero_grad()
            out.square().mean().backward()
            torch.nn.utils.clip_grad_norm_(own, CLIP)
            stepper.step()
        for parameter, value in zip(module.parameters(), own, strict=True):
            parameter.data[n] = value.data
    return module


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_equals_separate_plain_runs(runs, stage, world, optimizer):
    expected = plain_torch(optimizer)
    start = dict(Stacked().named_parameters())
    for rank in runs[world]:
        state = rank[f"{stage}.{optimizer}"]["state"]
        for name, parameter in expected.named_parameters():
            moved = (parameter - start[name]).detach().flatten(1).abs().amax(1)
            error = (state[name] - parameter).detach().flatten(1).abs().amax(1)
            assert (error <= 1e-4 * moved + 1e-7).all(), (name, error, moved)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_per_concept_on_every_rank(runs, stage, world):
    reference = runs[1][0]["0.sgd"]
    for rank in runs[world]:
        result = rank[f"{stage}.sgd"]
        torch.testing.assert_close(result["norms"], reference["norms"], rtol=1e-5, atol=0)
        squares = sum(g.flatten(1).square().sum(1) for g in result["clipped"].values())
        expected = result["norms"].clamp(max=CLIP)
        torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-5, atol=1e-7)
        for name, gradient in reference["clipped"].items():
            torch.testing.assert_close(result["clipped"][name], gradient, rtol=1e-4, atol=1e-7)
    assert (reference["norms"] > 2 * CLIP).any() and (reference["norms"] < CLIP).any()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_concept_harms_no_other(runs, stage, world):
    for rank in runs[world]:
        result = rank[f"{stage}.broken"]
        assert result["norms"].isfinite().tolist() == [True, False, True]
        assert all(value.isfinite().all() for value in result["state"].values())
        assert all((g[1] == 0).all() and (g[0] != 0).any() for g in result["clipped"].values())


def test_a_state_goes_on_at_any_stage_and_world_size(runs):
    half = on_ranks(2, two_and_three_steps, None)[0]
    expected = runs[1][0]["0.adamw"]["state"]
    for world in (1, 2):
        for rank in on_ranks(world, two_and_three_steps, half):
            assert len(rank) == len(STAGES) ** 2
            for state in rank.values():
                for name, value in expected.items():
                    torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2)])
def test_one_worker_has_nothing_to_share(
    workers: int, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.train import engines

    monkeypatch.setattr(engines.ranks, "world_size", lambda: workers)
    assert engines._wanted_stage(TrainSpec()) == stage
    assert engines._wanted_stage(TrainSpec(zero_stage=1)) == 1
