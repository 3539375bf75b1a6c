"""The errors a user can meet, each with the exit code that the command line gives it.

A message is one sentence that says what is wrong, where, and what to do about it.
"""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the operating system's errors that mean there is no room to write."""


class EchoDistillError(Exception):
    """An error of ours: the root of every error that the project raises on purpose."""

    exit_code = 4


class InputError(EchoDistillError):
    """A wrong input or setting: the user can mend it."""

    exit_code = 2


class ServiceError(EchoDistillError):
    """A service is out of reach or the disk is full: try again later or elsewhere."""

    exit_code = 3


class AwayError(ServiceError):
    """A service does not answer for now: what can wait for it waits."""
