"""What torch's compiler is told: before it compiles, and within what it compiles."""

import torch


def allow_variants(count: int) -> None:
    """Let one function be compiled for so many shapes and modes, or for more where it may already.

    Over its own limit torch would run the function eagerly, and say so nowhere.
    """
    from torch._dynamo import config  # takes seconds

    config.recompile_limit = max(count, config.recompile_limit)
    config.accumulated_recompile_limit = max(count, config.accumulated_recompile_limit)


@torch.library.custom_op("echodistill::table", mutates_args=())
def table(values: torch.Tensor) -> torch.Tensor:
    """Have the compiler write small values down, forward and backward, before they are used.

    It would compute them anew for every number of a large tensor that they meet.
    """
    return values.clone()


@table.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)


table.register_autograd(lambda _, gradient: table(gradient.contiguous()))
