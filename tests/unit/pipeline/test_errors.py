"""What an error becomes: a sentence and an exit code."""

import errno

import pytest

from model.errors import EchoDistillError, InputError, ServiceError
from pipeline.cli.main import caused_by, describe


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("the photo x.png is cut off: upload it again"), 2, "upload it again"),
        (ServiceError("S3 is away: check the network"), 3, "check the network"),
        (EchoDistillError("the training diverged"), 4, "diverged"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 3, "runs/a"),
        (ModuleNotFoundError("x", name="deepspeed.ops"), 2, "pip install 'echodistill[train]'"),
        (ModuleNotFoundError("x", name="moto"), 2, "pip install 'echodistill[pipeline]'"),
        (ZeroDivisionError("division by zero"), 4, "--debug"),
    ],
)
def test_every_error_has_its_sentence_and_code(error: Exception, code: int, words: str) -> None:
    message, found = describe(error)
    assert found == code
    assert words in message and "\n" not in message


def test_the_cause_that_says_most_is_told() -> None:
    try:
        try:
            raise ServiceError("the disk is full")
        except ServiceError as inner:
            raise RuntimeError("worker 0 failed") from inner
    except RuntimeError as outer:
        assert str(caused_by(outer)) == "the disk is full"
    bug = RuntimeError("a bug")
    assert caused_by(bug) is bug
