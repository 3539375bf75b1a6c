"""`make chaos`: twelve concepts, twenty-five faults; the exit code says whether all is well."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tests.conftest  # noqa: F401  (sets what Ray and torch read as they are imported)
from tests.chaos.chaos import KINDS, MORE, Plan, chaos, table
from tests.chaos.checks import problems
from tests.services import mlflow_process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=12)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--pack", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--restarts", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, *MORE), default=KINDS)
    given = parser.parse_args()
    plan = Plan(
        concepts=given.concepts,
        faults=given.faults,
        pack=given.pack,
        iterations=given.iterations,
        kinds=tuple(given.kinds),
        seed=given.seed,
        restarts=given.restarts,
    )
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="chaos-") as work:
        folder = Path(work)
        database = folder / "mlflow.db"
        SqlAlchemyStore(f"sqlite:///{database}", str(folder / "none")).engine.dispose()
        with mlflow_process(database, folder) as url:
            report = chaos(plan, folder, url, lambda line: print(line, flush=True))
    print(table(report))
    found = problems(plan, report)
    print("\n".join(found) or "every concept is registered exactly once, as if nothing happened")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
