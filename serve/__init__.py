"""The endpoint: one-step pictures of any concept over the OpenAI Images API."""
