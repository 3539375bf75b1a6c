"""The comparison's methods, statistics and report, without training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.evaluate.fidelity import Fidelity, FidelityMeter
from components.evaluate.truth import true_renders, truth_prompts
from components.ingest.concept_folder import Concept
from components.spec import resolve_spec, with_settings
from components.train.job import steps_done, total_iterations
from model.errors import InputError
from model.judge import load_judge
from model.pocket import pocket_paths
from pipeline.compare import Comparison, Outcome, Question, load_concepts, spread
from pipeline.compare_report import claims, document, table, write_grid
from pipeline.methods import METHODS, choose, run_spec
from pipeline.statistics import estimate, paired


def test_an_estimate_is_students_interval() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    # s = 1.2910, t(0.975, 3) = 3.1824
    assert found.half == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-6)
    assert estimate([1.0]).half is None
    assert paired([1.0, 2.0], [0.5, 1.5]).mean == 0.5


def test_every_method_gets_the_same_number_of_steps() -> None:
    spec = resolve_spec("pocket")
    whole = total_iterations(spec)
    for run in {method.run for method in METHODS if method.run}:
        own = run_spec(run, spec)
        wanted = spec.train.iterations if run == "no_echo_stage" else whole
        teacher, student = steps_done(own, total_iterations(own))
        assert teacher == wanted, run
        assert student in (0, wanted), run


def test_naive_methods_train_the_student_in_the_teachers_place() -> None:
    spec = resolve_spec("pocket")
    for run, rate in (("textual_inversion", 0.0), ("custom_diffusion", spec.train.teacher_lr)):
        own = run_spec(run, spec)
        assert own.base.teacher == spec.base.student
        assert own.method.order == "teacher" and own.train.teacher_lr == rate
    assert run_spec("echodistill", spec) == with_settings(spec, ["adapter.rank=full"])


def test_methods_are_chosen_by_name() -> None:
    assert [method.name for method in choose("echodistill, student_base")] == [
        "student_base",
        "echodistill",
    ]
    with pytest.raises(InputError, match="there is no method 'dreambooth'"):
        choose("dreambooth")
    with pytest.raises(InputError, match="there is no method ''"):
        choose("")


def test_some_concepts_are_spread_over_all() -> None:
    concepts = load_concepts(None, None)
    assert len(concepts) >= 8
    assert spread(concepts, 3) == [concepts[0], concepts[len(concepts) // 3], concepts[8]]
    assert spread(concepts, 99) == concepts


@pytest.fixture(scope="module")
def fox() -> Concept:
    return next(one for one in load_concepts(None, None) if one.id == "fox")


def test_truth_is_for_the_samples_alone(fox: Concept) -> None:
    digests = [image.sha256 for image in fox.images]
    found = true_renders("fox", digests)
    assert found is not None and found.dtype == torch.uint8
    assert found.shape[0] == len(truth_prompts()) and found.shape[2:] == (3, 128, 128)
    assert true_renders("fox", ["0" * 64]) is None
    assert true_renders("my-dog", digests) is None
    with pytest.raises(InputError):
        truth_prompts(99)


def test_the_judge_knows_the_subject_in_a_new_scene(fox: Concept) -> None:
    judge = load_judge()
    owl = next(one for one in load_concepts(None, None) if one.id == "owl")

    def seen(concept: Concept) -> torch.Tensor:
        truth = true_renders(concept.id, [image.sha256 for image in concept.images])
        assert truth is not None
        shown = judge.subjects(truth[:4, 0].float() / 127.5 - 1)
        return torch.nn.functional.normalize(judge.features(shown), dim=-1)

    mine, other = seen(fox), seen(owl)
    assert (mine @ mine.T).min() > (mine @ other.T).max() + 0.1


def test_a_picture_without_a_subject_stays_as_it_is() -> None:
    grey = torch.zeros(1, 3, 128, 128)
    assert torch.equal(load_judge().subjects(grey), grey)


def comparison(fox: Concept) -> Comparison:
    """Made-up figures of two concepts, to check what a report makes of them."""
    meter = FidelityMeter.__new__(FidelityMeter)
    meter.truth = None
    meter.references = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    figures = {"student_base": 0.2, "teacher": 0.6, "custom_diffusion": 0.1, "echodistill": 0.5}
    outcomes = []
    for method in choose(",".join(figures)):
        outcome = Outcome(method)
        for n, concept in enumerate(("a", "b")):
            value = figures[method.name] + 0.01 * n
            outcome.fidelity[concept] = Fidelity(value, value, value, None)
            outcome.pictures[concept] = torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8)
        outcomes.append(outcome)
    concepts = [Concept(name, "fox", "<new1>", "", True, fox.images) for name in ("a", "b")]
    prompts = {name: ["a {}"] for name in ("a", "b")}
    return Comparison(concepts, Question(prompts, 1, 5.0), outcomes, {"a": meter, "b": meter}, "x")


def test_claims_follow_from_the_figures(fox: Concept) -> None:
    found = {row["claim"]: row for row in claims(comparison(fox))}
    assert found["identity beats custom_diffusion"]["holds"] is True
    assert found["identity beats textual_inversion"]["holds"] is None  # was not run
    assert found["text is within 0.05 of the teacher's"]["holds"] is False
    covered = next(row for words, row in found.items() if "covers" in words)
    assert covered["value"]["mean"] == 0.75 and covered["holds"] is False


def test_a_report_says_what_was_measured(fox: Concept, tmp_path: Path) -> None:
    own, spec = comparison(fox), resolve_spec("pocket")
    rows = {row["name"]: row for row in document(own, spec)["methods"]}
    assert rows["echodistill"]["identity"] == 0.505 and rows["echodistill"]["truth"] is None
    assert rows["teacher"]["steps"] == 25 and rows["echodistill"]["steps"] == 1
    assert rows["echodistill"]["intervals"]["text"] == pytest.approx(0.0635, abs=1e-4)
    quick = document(own, spec, intervals=False)
    assert "intervals" not in quick["methods"][0]
    assert {claim["holds"] for claim in quick["claims"]} == {None}
    assert table(own).row_count == 4
    write_grid(own, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 100
    with pytest.raises(InputError, match=r"\.png"):
        write_grid(own, tmp_path / "grid.jpg")


def test_the_samples_are_where_the_pair_is() -> None:
    assert {one.id for one in load_concepts(str(pocket_paths().concepts), None)} == {
        one.id for one in load_concepts(None, None)
    }
