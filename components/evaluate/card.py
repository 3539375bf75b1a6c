"""What the registry's page of a version says: its adapter's card, and the figures."""

from __future__ import annotations

from pathlib import Path

from components.evaluate.evaluate import Metrics
from components.evaluate.tags import BEFORE
from model.adapter_meta import CARD_FILE
from model.names import METRICS

_LONGEST = 5000  # characters of a description that MLflow keeps


def card_of(adapter_dir: Path, found: Metrics) -> str:
    """Return an adapter's card with its figures, as Markdown.

    Args:
        adapter_dir: a verified adapter folder.
        found: its evaluation.
    """
    path = adapter_dir / CARD_FILE
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    figures = found.figures()
    rows = "\n".join(
        f"| {title} | {figures[BEFORE + name]:.3f} | {figures[name]:.3f} |"
        for name, title in METRICS.items()
    )
    how = (
        f"Measured by {found.feature_models} on {found.protocol} (prompts x seeds); figures of "
        "other features or prompts are not comparable."
    )
    table = f"| | the base, asked for the class | this adapter |\n| --- | ---: | ---: |\n{rows}"
    tail = f"\n\n## Figures\n\n{table}\n\n{how}\n"
    return card.rstrip()[: _LONGEST - len(tail)] + tail
