"""What a Serve configuration file imports: `import_path: serve.deploy:endpoint`.

Its `args` are settings of `serve/settings.py`; they win over the environment.
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve

from serve.app import build_app
from serve.settings import load_settings


def endpoint(args: dict[str, Any]) -> ray_serve.Application:
    """The application of these settings.

    Raises InputError for a wrong setting, and when others could reach the endpoint without a key.
    """
    return build_app(load_settings(**args))
