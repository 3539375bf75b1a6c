"""Each way of making training faster, alone and together, on one GPU.

README.md says how to run it. What is measured is written after every configuration, so that a run
that is cut short leaves what it had; a configuration that fails or outlasts its time is passed
over, and the document says why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from components.spec import RunSpec
from components.train.memory import release
from model.acceleration import compile_blocks, use_channels_last
from model.iteration import Frozen
from model.rewriting import rewrite
from pipeline import bench_measure as measure
from pipeline.bench import alone
from pipeline.bench_bases import bench_spec, build_frozen
from pipeline.bench_loops import EngineRunner, NaiveRunner, Photos, compared

LOSSES_AGREE = 3e-2  # bf16, after a few steps


@dataclass(frozen=True)
class Configuration:
    """What is switched on, and how many seconds it may take."""

    pack: int
    seconds: float
    bank: int = 0
    channels_last: bool = False
    cuda_graphs: bool = False
    compiled: bool = False
    benchmark: bool = False

    @property
    def name(self) -> str:
        """Name it for the table."""
        switches = [
            name
            for name in ("channels_last", "cuda_graphs", "compiled", "benchmark")
            if vars(self)[name]
        ]
        bank = [f"bank={self.bank}"] if self.bank else []
        return " ".join([f"pack {self.pack}", *bank, *switches])


BANK = 32
# Cheap ones first, then those that are compiled, by what they are worth.
PLAN = (
    Configuration(1, 40),
    Configuration(4, 40),
    Configuration(8, 50, BANK),
    Configuration(8, 50),
    Configuration(1, 40, channels_last=True),
    Configuration(4, 40, channels_last=True),
    Configuration(1, 40, cuda_graphs=True),
    Configuration(4, 40, cuda_graphs=True),
    Configuration(8, 50, BANK, cuda_graphs=True),
    # From here on networks are rewritten, which is not undone.
    Configuration(8, 300, BANK, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(12, 300, BANK, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(16, 300, BANK, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(4, 300, BANK, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(1, 250, BANK, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(8, 90, BANK, channels_last=True, compiled=True, cuda_graphs=True, benchmark=True),
    Configuration(8, 90, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(4, 90, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(1, 90, channels_last=True, compiled=True, cuda_graphs=True),
    Configuration(4, 90, BANK, channels_last=True, compiled=True),
)


class Sweep:
    """A sweep under way."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        """Measure nothing yet."""
        self.options, self.work = options, work
        self.began = time.monotonic()
        self.device = measure.find_device(options.device)
        self.document: dict[str, Any] = {
            **measure.environment(self.device),
            "base": options.base,
            "matmul": measure.matmul_rate(self.device),
            "agreement": {},
            "tflop": {},
            "configurations": [],
        }

    def run(self) -> None:
        """Check against the plain loop, then measure one configuration after the other."""
        options = self.options
        frozen = self._build("float32")
        self._attempt("agreement", 90, lambda: self._check(frozen))
        self._attempt("plain loop", 40, lambda: self._plain_loop(frozen, "float32"))
        del frozen
        release(self.device)
        frozen = self._build(options.precision)
        if options.precision != "float32":
            self._attempt("plain loop", 40, lambda: self._plain_loop(frozen, options.precision))
        self._attempt("operations", 60, lambda: self._count(frozen))
        if self.device.type == "cuda":
            self._attempt("waits", 40, lambda: self._waits(frozen))
        for configuration in PLAN:
            if options.packs and configuration.pack not in options.packs:
                continue
            if options.only and options.only not in configuration.name:
                continue
            self._configuration(frozen, configuration)

    def write(self) -> None:
        """Write what there is."""
        self.document["seconds"] = round(time.monotonic() - self.began, 1)
        text = json.dumps(self.document, indent=2)
        (self.options.out / "sweep.json").write_text(text + "\n")

    def say(self, text: str) -> None:
        """Tell a person where it is."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def _build(self, precision: str) -> Frozen:
        self.say(f"building the frozen networks in {precision}")
        return build_frozen(self.options.base, self._spec(), precision, self.device)

    def _spec(self, bank: int = 0, cuda_graphs: bool = False) -> RunSpec:
        sets = [f"train.cuda_graphs={str(cuda_graphs).lower()}", *self.options.set]
        if bank:
            sets.append(f"views.bank={bank}")
        return bench_spec(self.options.base, None, self.options.precision, sets)

    def _check(self, frozen: Frozen) -> None:
        """Hold the engine against the plain loop in float32: as it is, and as it may be run."""
        for name, channels_last, cuda_graphs in (("engine", False, False), ("fast", True, True)):
            if channels_last:
                use_channels_last(frozen)
            spec = self._spec(cuda_graphs=cuda_graphs)
            self.document["agreement"][name] = compared(spec, frozen, self._photos(frozen))
            self.write()
            release(self.device)
        restore(frozen)

    def _plain_loop(self, frozen: Frozen, precision: str) -> None:
        runner = NaiveRunner(self._spec(), frozen, self._photos(frozen))
        runner.run(2)
        times = measure.summary(runner.run(self.options.iterations))
        name = "plain_ms" if precision == "float32" else f"plain_{precision}_ms"
        self.document[name] = times["ms"]
        self.say(f"plain loop, {precision}: {times['ms']:.1f} ms")

    def _count(self, frozen: Frozen) -> None:
        """Count an iteration's operations, of networks as they were published."""
        for kind, bank in (("endless", 0), ("bank", BANK)):
            with self._runner(frozen, Configuration(1, 0, bank)) as runner:
                runner.run(1)
                tflop = measure.count_flops(lambda: runner.run(1)) / runner.concepts / 1e12
            self.document["tflop"][kind] = tflop

    def _waits(self, frozen: Frozen) -> None:
        """Note where the program waits for the GPU within an iteration."""
        with self._runner(frozen, Configuration(1, 0)) as runner:
            runner.run(self.options.iterations)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    runner.run(self.options.iterations)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught)
        self.document["waits"] = dict(places.most_common(12))

    def _configuration(self, frozen: Frozen, configuration: Configuration) -> None:
        left = 60 * self.options.minutes - (time.monotonic() - self.began)
        entry: dict[str, Any] = {"name": configuration.name, **asdict(configuration)}
        self.document["configurations"].append(entry)
        if left < min(30, configuration.seconds):
            entry["skipped"] = "the time is used up"
        else:
            error = self._attempt(
                configuration.name,
                configuration.seconds,
                lambda: self._measure(frozen, configuration, entry),
                most=left,
            )
            if error:
                entry["skipped"] = error
            else:
                speed = self._speed(entry)
                self.say(f"{configuration.name}: {entry['ms']:.1f} ms a concept {speed}")
        release(self.device)
        self.write()

    def _measure(self, frozen: Frozen, configuration: Configuration, entry: dict[str, Any]) -> None:
        restore(frozen)
        torch.backends.cudnn.benchmark = configuration.benchmark
        if configuration.compiled:
            rewrite(frozen)
        if configuration.channels_last:
            use_channels_last(frozen)
        if configuration.compiled:
            compile_blocks(frozen, self.options.backend)
        began = time.monotonic()
        with self._runner(frozen, configuration) as runner:
            runner.run(self.options.iterations)
            entry["first_seconds"] = round(time.monotonic() - began, 1)
            self.say(f"{configuration.name}: first iterations {entry['first_seconds']:.0f} s")
            entry["losses"] = runner.meter.losses()
            self._compare_losses(configuration, entry)
            measure.reset_peak(self.device)
            times = measure.summary(
                [each / runner.concepts for each in runner.run(2 * self.options.iterations)]
            )
            entry |= times
            entry["peak_gib"] = runner.peak_gib
            if self.device.type == "cuda":
                entry["reserved_gib"] = round(torch.cuda.max_memory_reserved() / measure.GIB, 3)
            plain = not configuration.compiled and not configuration.cuda_graphs
            if self.options.profile and not plain:
                name = configuration.name.replace(" ", "_")
                (self.options.out / f"{name}.txt").write_text(runner.profile())

    def _compare_losses(self, configuration: Configuration, entry: dict[str, Any]) -> None:
        """Hold the first block's losses against those of the plain engine, where that was run."""
        for other in self.document["configurations"]:
            switched = other["channels_last"] or other["cuda_graphs"] or other["compiled"]
            same = (other["pack"], other["bank"]) == (configuration.pack, configuration.bank)
            if other is not entry and same and not switched and "losses" in other:
                found, expected = entry["losses"], other["losses"]
                entry["loss_errors"] = {
                    name: abs(found[name] - value) / max(abs(value), 1e-3)
                    for name, value in expected.items()
                }
                entry["losses_agree"] = max(entry["loss_errors"].values()) <= LOSSES_AGREE

    @contextmanager
    def _runner(self, frozen: Frozen, configuration: Configuration) -> Iterator[EngineRunner]:
        spec = self._spec(configuration.bank, configuration.cuda_graphs)
        if configuration.compiled:
            train = spec.train.model_copy(
                update={"compile": True}
            )  # bank and echo stay as they are
            spec = spec.model_copy(update={"train": train})
        runner = EngineRunner(spec, frozen, self._photos(frozen), configuration.pack)
        try:
            yield runner
        finally:
            runner.free()

    def _attempt(self, name: str, seconds: float, work: Any, most: float = math.inf) -> str | None:
        """Do some work within a time; returns why it was not done, or None."""
        error: str | None = None
        try:
            with measure.within(min(seconds * self.options.patience, most)):
                work()
        except (Exception, measure.OutOfTime) as met:  # the next ones may do
            error = f"{type(met).__name__}: {str(met).strip()[:600]}"
            with (self.options.out / "errors.txt").open("a") as file:
                file.write(f"{name}\n{traceback.format_exc()}\n")
            self.document.setdefault("failed", {})[name] = error
            self.say(f"{name}: {error[:300]}")
        release(self.device)
        self.write()
        return error

    def _speed(self, entry: dict[str, Any]) -> str:
        """Add what follows from a time; returns it in words."""
        tflop = self.document["tflop"].get("bank" if entry["bank"] else "endless")
        if "plain_ms" in self.document:
            entry["speedup"] = round(self.document["plain_ms"] / entry["ms"], 2)
        if "plain_bf16_ms" in self.document:
            entry["speedup_bf16"] = round(self.document["plain_bf16_ms"] / entry["ms"], 2)
        if tflop:
            share = tflop / entry["ms"] * 1e3 / self.document["matmul"]["tflops"]
            entry["share_of_matmul"] = round(share, 3)
        return f"{entry.get('speedup', 0):.2f}x {entry.get('share_of_matmul', 0):.1%}"

    def _photos(self, frozen: Frozen) -> Photos:
        return Photos(self.work, frozen)


def restore(frozen: Frozen) -> None:
    """Put the networks back to how they were built."""
    pair = frozen.pair
    backbones = [each.network for each in (*frozen.backbones, frozen.identity)]
    for network in (pair.teacher, pair.student, pair.vae, *backbones):
        torch.nn.Module.to(network, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for block in network.modules():
            for method in ("forward", "_get_output_for_continuous_inputs"):
                vars(block).pop(method, None)


def table(document: dict[str, Any]) -> str:
    """Lay a document out for a person."""
    names = [name for name in ("plain_ms", "plain_bf16_ms") if name in document]
    plain = [f"{name} {document[name]}" for name in names]
    lines = [" ".join([f"matmul {document['matmul']['tflops']:.0f} TFLOP/s", *plain])]
    for name, found in document["agreement"].items():
        word = "agrees" if found["passed"] else "DIFFERS"
        lines.append(f"{name} {word}: {found['loss_error']:.1e} {found['move_error']:.1e}")
    lines.append(f"waits: {document.get('waits')}")
    lines.append(f"{'':52} {'ms':>7} {'speed':>6} {'of mm':>6} {'GiB':>6} {'1st s':>6} losses")
    for entry in document["configurations"]:
        if "ms" not in entry:
            lines.append(f"{entry['name']:52} {entry.get('skipped', '')[:100]}")
            continue
        agree = {True: "agree", False: "DIFFER", None: ""}[entry.get("losses_agree")]
        lines.append(
            f"{entry['name']:52} {entry['ms']:7.1f} {entry.get('speedup', 0):6.2f} "
            f"{entry.get('share_of_matmul', 0):6.1%} {entry.get('peak_gib', 0):6.1f} "
            f"{entry['first_seconds']:6.1f} {agree}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the sweep; exit code 1 when the engine and the plain loop do not agree."""
    options = _parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    device = measure.find_device(options.device)
    with tempfile.TemporaryDirectory() as work, alone(device):
        sweep = Sweep(options, Path(work))
        try:
            sweep.run()
        finally:
            sweep.write()
            text = table(sweep.document)
            (options.out / "sweep.txt").write_text(text + "\n")
            print(text, flush=True)
    found = sweep.document["agreement"]
    return 0 if found and all(each["passed"] for each in found.values()) else 1


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="sd-turbo", help="sd-turbo or sd-turbo-mini")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16"))
    parser.add_argument("--minutes", type=float, default=8.7, help="for all")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on each one's seconds")
    parser.add_argument(
        "--iterations",
        type=int,
        default=5,
        help="compared, which warm up; then twice as many timed",
    )
    parser.add_argument("--packs", type=lambda text: {int(part) for part in text.split(",")})
    parser.add_argument("--only", help="configurations whose name holds this")
    parser.add_argument("--set", action="append", default=[], help="of the run spec")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--profile", action="store_true", help="of every configuration that is fast"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
