"""From an adapter folder to a verified version in the MLflow registry."""
