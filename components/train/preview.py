"""What an adapter's preview and the samples of a training show; `{}` is the concept's phrase."""

PREVIEW_PROMPTS = (
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} on a red background",
)
