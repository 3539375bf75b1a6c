"""Names that several rooms of the house must agree on; imports nothing heavy."""

import re

CONCEPT_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
"""A concept's id: also a folder, a part of URLs and of registry names, so nothing else passes."""

TOKEN_PATTERN = re.compile(r"<[A-Za-z0-9][A-Za-z0-9_-]{0,30}>")
"""What a concept's token string looks like, e.g. `<new1>` (match it whole)."""

MODEL_PREFIX = "echodistill."
"""A concept's registered model is `echodistill.<concept id>`."""

CANDIDATE = "candidate"
"""Alias of the version that was registered last."""

CHAMPION = "champion"
"""Alias of the version that is served."""

ADAPTER_ARTIFACT = "artifacts/adapter"
"""Where a version keeps its adapter folder, below its source."""

CONCEPT_DIGEST_TAG = "concept_digest"
SPEC_DIGEST_TAG = "spec_digest"
BASE_HASH_TAG = "base_hash"
SHA256_TAG = "adapter_sha256"
METRIC_TAG = "metric."
"""A version has one tag a figure: `metric.clip_i`."""

METRICS = {"clip_i": "CLIP-I", "dino": "DINO", "clip_t": "CLIP-T"}
"""What a person calls the figures that programs name shortly."""

MEASURED = "clip_i"
"""A version that has this figure was evaluated: it is written after all others."""
