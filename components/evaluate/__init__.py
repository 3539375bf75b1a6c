"""How well an adapter draws its concept: METHOD.md "Metrics" over DreamBench's prompts."""
