"""The `echodistill` command: its groups, its exit codes, and the sentence an error becomes.

Only typer and rich are imported here; a command imports what it needs when it runs, so that each
needs its own extra and no other.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from types import FrameType

import typer
from typer.exceptions import TyperException

from pipeline.cli import (
    bench,
    check,
    compare,
    demo,
    evaluate,
    export,
    generate,
    pipeline,
    promote,
    serve,
    status,
    submit,
    train,
)
from pipeline.cli.interruptible import TerminatedError, abandoned
from pipeline.cli.output import Output
from pipeline.scratch import end_at_once

OK, SOME_FAILED, WRONG_INPUT, NO_SERVICE, OUR_ERROR, INTERRUPTED = 0, 1, 2, 3, 4, 130
# As a shell says of tools that end when who reads them does (`... | head`).
UNREAD = 128 + signal.SIGPIPE

# The extra that a command needs; `check` needs none.
EXTRA_OF = {
    "train": "train",
    "generate": "serve",
    "export": "serve",
    "evaluate": "serve",
    "promote": "serve",
    "rollback": "serve",
    "serve": "serve",
    "demo": "pipeline",
    "compare": "train",
    "bench": "train,serve",
    "status": "pipeline",
    "submit": "train",
    "retry": "train",
    "cancel": "train",
    "logs": "train",
    "pipeline": "pipeline,kubeflow",
}
# The last two: a folder is to be where a file is, a file where a folder is. (To read a folder as a
# file is refused where it is read.)
NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
}

app = typer.Typer(
    add_completion=False,
    help="Batches of visual concepts in, one-step text-to-image adapters out.",
)
app.command("check")(check.check)
app.command("train")(train.train)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("logs")(status.logs)
app.command("cancel")(submit.cancel)
app.command("retry")(submit.retry)
app.command("evaluate")(evaluate.evaluate)
app.command("promote")(promote.promote)
app.command("rollback")(promote.rollback)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("compare")(compare.compare)
app.add_typer(bench.app, name="bench")
app.add_typer(pipeline.app, name="pipeline")


@app.callback()
def _root() -> None:
    """Batches of visual concepts in, one-step text-to-image adapters out."""
    from pipeline.services import quiet_libraries

    quiet_libraries()  # before a command imports any of them


def describe(error: BaseException, command: str = "") -> tuple[str, int]:
    """The sentence and the exit code that an error of a command stands for."""
    from model.errors import DISK_FULL, EchoDistillError

    if isinstance(error, EchoDistillError):
        return str(error), error.exit_code
    if isinstance(error, TyperException):
        return f"{error.format_message()} (echodistill --help)", WRONG_INPUT
    if isinstance(error, ModuleNotFoundError) and command in EXTRA_OF:
        missing = (error.name or "").split(".")[0]
        return (
            f"{command} needs {missing}, which is not installed: pip install -c constraints.txt "
            f"-e '.[{EXTRA_OF[command]}]' in the checkout",
            WRONG_INPUT,
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full or its quota is used up{where}: free some space", NO_SERVICE
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE and error.filename:
        return (
            f"{error.filename} cannot be written ({error.strerror}): give a folder that can, or "
            "change its owner or permissions",
            WRONG_INPUT,
        )
    kind = type(error).__name__
    return f"an error of ours: {kind}: {error}; --debug shows where, please report it", OUR_ERROR


def caused_by(error: BaseException) -> BaseException:
    """The error worth telling: ours if one is in the chain of causes, else the outermost."""
    from model.errors import DISK_FULL, EchoDistillError

    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        full = isinstance(link, OSError) and link.errno in DISK_FULL
        if full or isinstance(link, EchoDistillError | KeyboardInterrupt):
            return link
        link = link.__cause__ or link.__context__
    return error


def run(arguments: list[str], output: Output) -> int:
    """Runs one command and returns its exit code; never raises."""
    try:
        code = app(args=arguments, prog_name="echodistill", standalone_mode=False, obj=output)
        # typer makes 130 of Ctrl-C.
        return _interrupted(output) if code == INTERRUPTED else int(code or OK)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(output)
    except (Exception, SystemExit) as raised:
        # typer and rich make an exit of a pipe that broke, any pipe.
        error = raised.__context__ or raised if isinstance(raised, SystemExit) else raised
        cause = caused_by(error)
        if isinstance(cause, KeyboardInterrupt):
            return _interrupted(output)
        if isinstance(cause, BrokenPipeError) and output.unread():
            return UNREAD
        message, code = describe(cause, arguments[0])
        if output.debug:
            traceback.print_exception(error, file=sys.stderr)
        output.fail(message, code)
        return code


def _interrupted(output: Output) -> int:
    output.fail("interrupted; everything that was started has been stopped", INTERRUPTED)
    return INTERRUPTED


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise TerminatedError


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:] or ["--help"]
    as_json, debug = "--json" in arguments, "--debug" in arguments
    output = Output(as_json=as_json, debug=debug)
    code = run(arguments, output)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = UNREAD
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if abandoned():
        end_at_once(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
