"""Engines as replicas of Ray Serve: `serve run redknot_hf.serving.ray:app model=... plan=... store=redis://...`.

One application of two or three deployments: a door that speaks OpenAI's API and holds no weights, replicas that
answer, and replicas that only read, if some are asked for. Ray is imported when the application is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["app"]


def app(args: Mapping[str, Any]) -> Any:
    """The application, for `serve run`, a config file of Ray Serve, or `ray.serve.run`.

    Args:
        args: As `redknot_hf.serving.ray.options.Options` has them; what is not given is taken from the environment
            (`REDKNOT_MODEL`, `REDKNOT_PLAN`, ...).

    Raises:
        ImportError: Ray, or what a server needs, is not installed.
        ValueError: An argument is off, or there is no such argument.
    """
    try:
        from .build import application
    except ImportError as e:
        missing = (e.name or "").partition(".")[0]
        if missing in ("redknot_hf", "redknot_kernels"):
            raise
        raise ImportError(f"replicas of Ray Serve need {e.name}: pip install 'redknot-hf[ray]'") from e
    from .options import Options

    return application(Options.of(args))
