"""How many concepts train together where `pack.size` is auto."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.spec import AUTO_PACK, AUTO_PACK_ON_CPU, resolve_spec, spec_digest
from components.train.memory import fitting, measured_pack
from model.errors import InputError


def test_as_many_fit_as_the_memory_holds() -> None:
    assert fitting(one=18, two=30, room=140, most=16) == 1 + (126 - 18) // 12
    assert fitting(one=18, two=30, room=140, most=4) == 4
    assert fitting(one=18, two=30, room=21, most=4) == 1  # nothing but to try
    assert fitting(one=18, two=18, room=140, most=4) == 4


def test_a_cpu_is_not_measured() -> None:
    def never(concepts: int) -> None:
        raise AssertionError(concepts)

    cpu = torch.device("cpu")
    assert measured_pack(5, cpu, never) == AUTO_PACK_ON_CPU
    assert measured_pack(1, cpu, never) == 1


def test_auto_plans_packs_of_its_own_size_and_changes_no_digest() -> None:
    auto, two = (resolve_spec("pocket", None, [f"pack.size={size}"]) for size in ("auto", 2))
    assert (auto.pack.planned, two.pack.planned) == (AUTO_PACK, 2)
    assert spec_digest(auto) == spec_digest(two)


@pytest.mark.parametrize("size", [0, 257, "many", True, 1.5])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(InputError, match=r"pack\.size = .* must be auto or a whole number"):
        resolve_spec("pocket", None, [f"pack.size={size}"])


@pytest.mark.parametrize("setting", ["train.zero_stage=3", "train.checkpointing=true"])
def test_cuda_graphs_refuse_what_cannot_be_recorded(setting: str) -> None:
    with pytest.raises(InputError, match=r"train\.cuda_graphs = True in .*--set.* is wrong"):
        resolve_spec("pocket", None, ["train.cuda_graphs=true", setting])
