"""The methods that `echodistill compare` sets side by side, each as settings of the run spec.

All are trained by the one training path, on the same references, with the same number of steps of
whatever they train (but for `no_echo_stage`, which ends where echo begins), and drawn under the
same prompts and seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from components.spec import RunSpec, with_settings
from components.train.job import total_iterations
from model.errors import InputError
from model.settings import TEACHER_STEPS

Drawer = Literal["base", "student", "teacher"]


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        name: as on the command line and in the JSON.
        words: what it is, for people.
        run: the training run that it is drawn from; several methods may share one. Empty for none.
        drawer: `base`, the student without an adapter, asked for the class noun; `student`, with
            it; `teacher`, with guidance, without a run as it was before training.
        steps: network evaluations of a picture.
    """

    name: str
    words: str
    run: str
    drawer: Drawer
    steps: int = 1


METHODS = (
    Method("student_base", "base student, class noun only", "", "base"),
    Method("teacher_base", "base teacher, class noun only, 25 steps", "", "teacher", TEACHER_STEPS),
    Method("textual_inversion", "Textual Inversion of the student", "textual_inversion", "student"),
    Method("custom_diffusion", "Custom Diffusion of the student", "custom_diffusion", "student"),
    Method(
        "teacher", "Custom Diffusion of the teacher, 25 steps", "teacher", "teacher", TEACHER_STEPS
    ),
    Method("sequential", "teacher first, then distilled", "sequential", "student"),
    Method("no_adversarial", "without the adversarial loss", "no_adversarial", "student"),
    Method("separate_text", "without the shared text encoder", "separate_text", "student"),
    Method("no_follow", "student does not follow the teacher", "no_follow", "student"),
    Method("no_echo", "without echo", "no_echo", "student"),
    Method("no_echo_teacher", "its teacher, 25 steps", "no_echo", "teacher", TEACHER_STEPS),
    Method("no_echo_stage", "without the echo stage's iterations", "no_echo_stage", "student"),
    Method(
        "no_echo_stage_teacher",
        "its teacher, 25 steps",
        "no_echo_stage",
        "teacher",
        TEACHER_STEPS,
    ),
    Method("echodistill", "EchoDistill, one step", "echodistill", "student"),
    Method("echodistill_4_steps", "the same in four steps", "echodistill", "student", 4),
    Method("echodistill_teacher", "its teacher, 25 steps", "echodistill", "teacher", TEACHER_STEPS),
)
FULL = "echodistill"
QUICK = (
    "student_base",
    "textual_inversion",
    "custom_diffusion",
    "teacher",
    "no_adversarial",
    FULL,
)
# The student learns by its own denoising loss as item 1 teaches the teacher: it takes its place.
_ON_STUDENT = frozenset({"textual_inversion", "custom_diffusion"})


def choose(names: str | None, default: tuple[str, ...] | None = None) -> list[Method]:
    """Pick methods by a comma-separated list of names, in the table's order.

    Raises:
        InputError: for a name that no method has.
    """
    known = {method.name: method for method in METHODS}
    every = list(default or known)
    wanted = every if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise InputError(f"there is no method {name!r}: choose from {', '.join(known)}")
    return [method for method in METHODS if method.name in wanted]


def run_spec(run: str, spec: RunSpec) -> RunSpec:
    """Return the run spec that trains a run: the given one, but for what makes the method."""
    whole = total_iterations(spec)
    without_echo = [f"train.iterations={whole}", "echo.rounds=0"]
    on_student = [f'base.teacher="{spec.base.student}"', "method.order=teacher", *without_echo]
    settings = {
        "textual_inversion": [*on_student, "train.teacher_lr=0"],
        "custom_diffusion": on_student,
        "teacher": ["method.order=teacher", *without_echo],
        "sequential": ["method.order=sequential"],
        "no_adversarial": ["loss.adv_weight=0"],
        "separate_text": ["method.shared_text=false"],
        # A student that does not follow has the whole way to go, at the teacher's rate.
        "no_follow": ["method.follow=0", f"train.student_lr={spec.train.teacher_lr}"],
        "no_echo": without_echo,  # as many iterations, on the references alone
        "no_echo_stage": ["echo.rounds=0"],  # the only one that trains for less time
        FULL: [],
    }
    # How adapters are stored is not what is compared, and finding a low rank takes its time.
    stored = ["train.keep_teacher=true", "adapter.rank=full"]
    return with_settings(spec, [*settings[run], *stored])


def trains_student_as_teacher(run: str) -> bool:
    """Tell whether a run's adapter is in the teacher's place, the student being its teacher."""
    return run in _ON_STUDENT
