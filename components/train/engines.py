"""DeepSpeed engines around what is trained, and their whole state whatever the ZeRO stage.

Each engine owns one small module whose parameters are all stacked [N, ...] along the concept axis;
the frozen networks stay outside. Gradients are clipped per concept, so DeepSpeed's own clipping is
off and every slice is scaled between backward and step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from components.spec import RunSpec, TrainSpec
from components.train import ranks
from components.train.job import learning_rates, steps_done
from model.concept import StudentWeights, TeacherWeights
from model.discriminators import DiscriminatorHeads
from model.errors import InputError
from model.iteration import Frozen

if TYPE_CHECKING:
    from components.train.checkpoint import ConceptState

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, torch.Tensor]
"""Parameters `<name>` and Adam moments `exp_avg.<name>`, `exp_avg_sq.<name>`: [N, ...] float32."""


def start_deepspeed(device: torch.device) -> None:
    """Join DeepSpeed to this process's torch process group, or make one from the environment.

    Args:
        device: "cpu" (gloo) or a "cuda" device (nccl).
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch renames: a warning each, on every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On a CPU it would compile an operator for 40 to 65 seconds, for nothing that we use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def make_engine(
    module: nn.Module, rates: Mapping[str, float], settings: TrainSpec, step: int, state: State
) -> Any:
    """Wrap a module in a DeepSpeed engine that goes on from a state.

    Args:
        module: parameters [N, ...] float32, already at the state's values.
        rates: learning rate of each parameter by name; "" is the rate of those not named.
        settings: ZeRO stage, optimizer and weight decay.
        step: optimizer steps done so far.
        state: as `read_state` gives it; without moments for a start from zero.
    """
    import deepspeed

    groups: list[dict[str, Any]] = [
        {"params": [parameter], "name": name, "lr": _rate(rates, name)}
        for name, parameter in module.named_parameters()
    ]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        on_gpu = next(module.parameters()).is_cuda
        optimizer = torch.optim.AdamW(
            groups,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=settings.weight_decay,
            fused=on_gpu,  # one pass over memory
        )
    else:
        optimizer = torch.optim.SGD(groups, weight_decay=settings.weight_decay)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": _wanted_stage(settings),
            # At stage 3 it is allocated whole: half a billion numbers an engine, by default.
            "reduce_bucket_size": sum(parameter.numel() for parameter in module.parameters()),
        },
        # It would wait for the GPU twice a step, to print a speed that is never asked for.
        "timers": {"throughput": {"enabled": False}},
    }
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    if settings.optimizer == "adamw":
        _write_moments(engine, step, state)
    return engine


def make_engines(
    spec: RunSpec, frozen: Frozen, states: Sequence[ConceptState]
) -> tuple[Any, Any, Any]:
    """Build the engines of teacher, student and heads from states of the same iteration.

    Raises:
        InputError: for a student that cannot follow its teacher.
    """
    settings, pair = spec.train, frozen.pair
    if spec.method.follow and pair.teacher_layout != pair.student_layout:
        raise InputError(
            "method.follow needs a student whose cross-attention layers are its teacher's, which "
            f"those of {pair.name} are not: set method.follow=0"
        )
    learned, distilled = steps_done(spec, states[0].iteration)
    rates = learning_rates(spec, states[0].iteration)
    stacked: dict[str, State] = {
        name: stack_states([state.groups[name] for state in states]) for name in states[0].groups
    }
    teacher = TeacherWeights(stacked["teacher"]["kv"], stacked["teacher"]["rows"])
    student = StudentWeights(stacked["student"]["kv"], stacked["student"].get("rows"))
    dims = [backbone.dim for backbone in frozen.backbones]
    heads = DiscriminatorHeads(dims, [state.concept_id for state in states], spec.seed)
    for name, parameter in heads.named_parameters():
        parameter.data.copy_(stacked["heads"][name])
    parts: list[tuple[str, torch.nn.Module, int]] = [
        ("teacher", teacher, learned),
        ("student", student, distilled),
        ("heads", heads, distilled),
    ]
    made = [
        make_engine(module.to(pair.device), rates[name], settings, step, stacked[name])
        for name, module, step in parts
    ]
    return made[0], made[1], made[2]


def set_rates(engine: Any, rates: Mapping[str, float]) -> None:
    """Set the learning rates of the next step, as `make_engine` takes them."""
    for group in engine.optimizer.param_groups:
        group["lr"] = _rate(rates, group["name"])


def _rate(rates: Mapping[str, float], name: str) -> float:
    return rates.get(name, rates.get("", 0.0))


def clip_per_concept(engine: Any, clip_norm: float) -> torch.Tensor:
    """Clip the averaged gradient of every concept's slice, between backward and step.

    A slice whose norm is not finite is set to zero, so that it harms no other concept.

    Args:
        engine: after `engine.backward`.
        clip_norm: largest norm of one concept's gradient over all of the engine's parameters.

    Returns:
        The norms before clipping, [N] float32, the same on every rank; not finite where the
        concept's loss was not.
    """
    from deepspeed.utils import safe_get_full_grad

    parameters = list(engine.module.parameters())
    gradients = [safe_get_full_grad(parameter) for parameter in parameters]
    each = [torch.linalg.vector_norm(part.float().flatten(1), dim=1) for part in gradients]
    norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
    finite = norms.isfinite()
    scale = torch.where(finite, (clip_norm / (norms + 1e-6)).clamp(max=1.0), 0.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        shape = (-1, *[1] * (gradient.dim() - 1))
        # In place, as a pack's gradients take gigabytes; without ZeRO they are the parameter's own.
        gradient.mul_(scale.view(shape)).masked_fill_(~finite.view(shape), 0.0)
        _write_gradient(parameter, gradient)
    return norms


def gradients(engine: Any) -> State:
    """Read the whole averaged gradients by parameter name, between backward and step."""
    from deepspeed.utils import safe_get_full_grad

    named = engine.module.named_parameters()
    return {name: safe_get_full_grad(parameter).float().clone() for name, parameter in named}


def read_state(engine: Any) -> State:
    """Gather the whole state of an engine on the CPU; every rank must call it together."""
    state: State = {}
    inner = _inner_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        state[name] = _kept(_whole(engine, parameter, None))
        if isinstance(inner, torch.optim.AdamW):
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = _kept(_whole(engine, parameter, moment))
    return state


def whole_parameter(engine: Any, name: str) -> torch.Tensor:
    """Copy a whole parameter [N, ...] on its device; every rank must call it together."""
    return _whole(engine, engine.module.get_parameter(name), None).clone()


def move_parameter(engine: Any, name: str, move: torch.Tensor) -> None:
    """Add a movement [N, ...], the same on every rank, to a parameter and what stands for it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    parameter: Any = engine.module.get_parameter(name)
    if hasattr(parameter, "ds_id"):
        parameter.ds_tensor.data.add_(_own_part(parameter, move))
        safe_set_local_fp32_param(parameter, parameter.ds_tensor.data)
        if parameter.data.shape == parameter.ds_shape:  # small ones stay whole between steps
            parameter.data.add_(move)
        return
    parameter.data.add_(move)
    if _stage(engine):
        safe_set_full_fp32_param(parameter, parameter.data)


def concept_slice(state: State, n: int) -> State:
    """Cut concept n out of a state: the same names, without the concept axis."""
    return {name: tensor[n].clone() for name, tensor in state.items()}


def stack_states(states: list[State]) -> State:
    """Put states of single concepts together along a new first axis."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def free(engine: Any) -> None:
    """Take DeepSpeed's hooks and buffers down, so that another engine can follow."""
    engine.destroy()


def _wanted_stage(settings: TrainSpec) -> int:
    if settings.zero_stage == "auto":
        return 2 if ranks.world_size() > 1 else 0
    return settings.zero_stage


def _inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if _stage(engine) else engine.optimizer


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _flat_parameters(engine: Any) -> list[torch.Tensor]:
    """Return the tensors that the inner optimizer steps on this rank."""
    stage = _stage(engine)
    if stage == 0:
        return [
            parameter for group in engine.optimizer.param_groups for parameter in group["params"]
        ]
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _write_moments(engine: Any, step: int, state: State) -> None:
    """Give the optimizer its state before its first step, where it would start from zero."""
    inner = _inner_optimizer(engine)
    for flat in _flat_parameters(engine):
        inner.state[flat] = {
            # A fused step counts where it works.
            "step": torch.tensor(float(step), device=flat.device),
            **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
        }
    if _stage(engine) in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for moment in MOMENTS:
            if f"{moment}.{name}" in state:
                _write_moment(engine, parameter, moment, state[f"{moment}.{name}"])


def _write_moment(engine: Any, parameter: Any, moment: str, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if _stage(engine) == 0:
        engine.optimizer.state[parameter][moment].copy_(value)
    elif _stage(engine) == 3:
        safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _write_gradient(parameter: Any, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    if hasattr(parameter, "ds_id"):
        safe_set_local_grad(parameter, _own_part(parameter, value))
    else:
        safe_set_full_grad(parameter, value)


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """Cut this rank's part out of a whole tensor at ZeRO stage 3.

    DeepSpeed's own whole-tensor setters fail there when the ranks do not divide its size: the last
    part is padded.
    """
    size = parameter.ds_tensor.numel()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    flat = F.pad(value.flatten(), (0, size * world - value.numel()))
    return flat.narrow(0, size * rank, size)


def _whole(engine: Any, parameter: Any, moment: str | None) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _stage(engine) == 0:
        value = parameter.detach() if moment is None else engine.optimizer.state[parameter][moment]
    elif moment is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, moment)
    shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    return value.detach().float().reshape(shape)


def _kept(value: torch.Tensor) -> torch.Tensor:
    return value.cpu().clone()
