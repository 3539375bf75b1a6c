"""What became of a pipeline run."""
