"""Settings of the method, with METHOD.md's values as defaults.

Plain frozen dataclasses: the run spec nests them and its validator reads `__pydantic_config__`,
so `model/` needs no pydantic. A probability or share is in [0, 1], a weight is at least 0.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

TEACHER_STEPS = 25
"""Network evaluations of a teacher's picture, where nothing else is asked for."""

_FORBID_EXTRA: dict[str, str] = {"extra": "forbid"}


def _check(owner: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], not {value}")


@dataclass(frozen=True)
class MethodSettings:
    """Which parts of the method take part; all but the defaults are there to be compared with.

    Attributes:
        order: `together`, items 1 to 5 in every iteration; `sequential`, item 1 alone for the whole
            main stage, then items 2 to 5 for as many iterations; `teacher`, item 1 alone, which
            leaves the student as it is.
        shared_text: the student reads the token rows that the teacher learns; without, it has rows
            of its own that learn from its own loss.
        follow: so much, from 0 to 2, of every step that the teacher's keys and values take is taken
            by the student's too, whose own loss then corrects it: they need the same layers. A
            student that was distilled from its teacher draws much of what the teacher has learned
            by that alone. Ours, 0 by default; without effect where the student does not learn.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_EXTRA

    order: Literal["together", "sequential", "teacher"] = "together"
    shared_text: bool = True
    follow: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing (ValueError)."""
        _check(self, 0, 2, "follow")


@dataclass(frozen=True)
class LossSettings:
    """Weights and variants of the losses of items 1 to 5.

    Attributes:
        rec_weight: weight of the teacher's `L_rec`.
        mse_weight: weight of `L_mse`, whose factor 0.5 is inside the loss.
        id_weight: weight of `L_id`.
        perc_weight: weight of `L_perc`; MS-SWD's factor 0.1 is inside the loss.
        adv_weight: weight of `L_adv`, the sum over the discriminators.
        perceptual: `swd` (MS-SWD) or `lpips` (over the first backbone's layers).
        swd_directions: projections a call of MS-SWD; fewer are cheaper and noisier.
        swd_bins: MS-SWD counts projections in so many bins instead of sorting them, which is faster
            on a GPU (and compiled there by torch); None sorts.
        masked_id: compare identities on the subject only. Both pictures are multiplied by where
            the teacher's guidance acts, which keeps the references' background out of the
            identity. Ours, off by default.
        guidance: classifier-free guidance scale of the alignment target.
        guidance_rescale: how far the target's channels get back the mean and the spread that the
            teacher's answer has without guidance, which pushes colours to extremes: 0 as METHOD.md
            has it, 1 wholly (after Lin et al., arXiv 2305.08891, 3.4, who keep the spread alone).
        align_min_t: smallest `t'` of the alignment target.
        align_max_t: largest `t'` of the alignment target.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_EXTRA

    rec_weight: float = 1.0
    mse_weight: float = 1.0
    id_weight: float = 1.0
    perc_weight: float = 1.0
    adv_weight: float = 1.0
    perceptual: Literal["swd", "lpips"] = "swd"
    swd_directions: int = 128
    swd_bins: int | None = None
    masked_id: bool = False
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    align_min_t: int = 0
    align_max_t: int = 999

    def __post_init__(self) -> None:
        """Refuse values that mean nothing (ValueError)."""
        weights = ("rec_weight", "mse_weight", "id_weight", "perc_weight", "adv_weight")
        _check(self, 0, 1e6, *weights)
        _check(self, 0, 100, "guidance")
        _check(self, 0, 1, "guidance_rescale")
        _check(self, 1, 4096, "swd_directions")
        if self.swd_bins is not None:
            _check(self, 16, 65536, "swd_bins")
        _check(self, 0, 999, "align_min_t", "align_max_t")
        if self.align_min_t > self.align_max_t:
            raise ValueError("align_min_t must not be over align_max_t")


@dataclass(frozen=True)
class ViewSettings:
    """Augmentation of reference images (METHOD.md "Reference data"); sizes in parts of S.

    Attributes:
        flip: probability of a horizontal flip.
        paste_probability: probability that the image is scaled to `paste_min`..1 and pasted on an
            empty canvas; otherwise it is scaled to `crop_min`..`crop_max` and cropped.
        far_below: a scale under this adds "far away" words to the prompt.
        scale_words: whether the prompt says how large the subject is.
        caption_probability: probability that a view of an image that has a caption takes it for its
            prompt; a template otherwise. Ours: a caption says what is not the subject. Without
            effect on images without caption.
        bank: so many views a concept, drawn once and encoded once, among which every item chooses;
            None draws every item's view anew. Faster, and ours: METHOD.md's views are endless.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_EXTRA

    flip: float = 0.5
    paste_probability: float = 0.66
    paste_min: float = 1 / 3
    crop_min: float = 1.2
    crop_max: float = 1.4
    far_below: float = 0.6
    scale_words: bool = True
    caption_probability: float = 1.0
    bank: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing (ValueError)."""
        if self.bank is not None:
            _check(self, 1, 65536, "bank")
        _check(self, 0, 1, "flip", "paste_probability", "far_below", "caption_probability")
        _check(self, 0.1, 1, "paste_min")
        _check(self, 1, 4, "crop_min", "crop_max")
        if self.crop_min > self.crop_max:
            raise ValueError("crop_min must not be over crop_max")


@dataclass(frozen=True)
class EchoSettings:
    """The echo stage: student samples join the references (METHOD.md "Echo"; sizes are ours).

    Attributes:
        samples: student samples drawn per round.
        rounds: number of rounds; 0 turns the stage off.
        iterations_share: iterations of a round as a part of the main stage's.
        share: probability that an item of a batch is a student sample.
        keep: part of the samples kept, those nearest to the references by identity.
        steps: network evaluations of a sample; in more than one it can be a better picture.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID_EXTRA

    samples: int = 16
    rounds: int = 2
    iterations_share: float = 0.25
    share: float = 0.5
    keep: float = 0.5
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse values that mean nothing (ValueError)."""
        _check(self, 1, 4096, "samples")
        _check(self, 1, 50, "steps")
        _check(self, 0, 100, "rounds")
        _check(self, 0, 10, "iterations_share")
        _check(self, 0, 1, "share", "keep")
