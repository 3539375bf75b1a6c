"""Names under which the registry holds what was measured of a version, and how."""

MODELS_TAG = "metric_models"
PROTOCOL_TAG = "metric_protocol"
PHOTOS_TAG = "metric_photos"
BEFORE = "before_"  # names of the base's figures begin with it
