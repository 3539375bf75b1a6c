"""What torch's compiler is told before it compiles."""


def allow_variants(count: int) -> None:
    """Let one function be compiled for so many shapes and modes, or for more where it may already.

    Over its own limit torch would run the function eagerly, and say so nowhere.
    """
    from torch._dynamo import config  # takes seconds

    config.recompile_limit = max(count, config.recompile_limit)
    config.accumulated_recompile_limit = max(count, config.accumulated_recompile_limit)
