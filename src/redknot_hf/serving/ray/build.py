"""The application: deployments, their settings, and the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from transformers import AutoTokenizer

from redknot_hf.plan.plan import HeadPlan
from redknot_hf.serving.server import Settings, app_for
from redknot_hf.serving.server.settings import check_door

from .fleet import Fleet
from .options import Options
from .replica import Answerer, Reader

# Ray's decorators, whose types do not say what they return.
_deployment: Any = serve.deployment
_routing: Any = RequestRouterConfig
# Requests that the door lets in; what may be under way is bounded by `queue`, and health is asked besides.
_DOOR = 1 << 16


class Door:
    """OpenAI's API in front of replicas: words and routes are here, weights are not.

    Args:
        options: Of the application.
        answerers, readers: Handles of replicas.
    """

    async def __init__(self, options: Options, answerers: Any, readers: Any = None) -> None:
        facts = await answerers.facts.remote()
        tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
        self.fleet = Fleet(options, facts, tokenizer, HeadPlan.load(options.plan), answerers, readers)
        self.settings = settings_of(options)

    def __serve_build_asgi_app__(self) -> Any:
        """Asked by Ray."""
        return app_for(self.fleet, self.settings, Fleet.load)


def settings_of(options: Options) -> Settings:
    """What the server is told.

    Raises:
        ValueError: The key is none.
    """
    template = None
    if options.chat_template is not None:
        template = Path(options.chat_template).read_text(encoding="utf-8")
    return Settings(
        name=options.name or options.model, key=options.api_key, timeout=options.timeout, max_body=options.max_body,
        hosts=check_door("127.0.0.1", options.api_key, options.no_auth), chat_template=template,
    )  # fmt: skip


def application(options: Options) -> Any:
    """The deployments, bound to each other.

    Raises:
        ValueError: The plan is none, or the key is.
    """
    HeadPlan.load(options.plan)  # now, and not in a process elsewhere
    settings_of(options)
    options = _at_home(options)
    gpus = options.gpus if options.gpus is not None else float(torch.cuda.is_available())
    own: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": gpus},
        "health_check_period_s": options.health,
        "graceful_shutdown_timeout_s": options.drain,
    }
    answerers = _deployment(Answerer, name="answer").options(
        max_ongoing_requests=options.taken,
        request_router_config=_routing(
            request_router_class="redknot_hf.serving.ray.router:SegmentRouter",
            request_routing_stats_period_s=options.look,
            request_routing_stats_timeout_s=max(10 * options.look, 5),
            request_router_kwargs={"trust": max(10 * options.look, 5)},
        ),
        **_scale(options),
        **own,
    )
    bound = [answerers.bind(options)]
    if options.prefill:
        readers = _deployment(Reader, name="read").options(num_replicas=options.prefill, **own)
        bound.append(readers.bind(options))
    door = _deployment(serve.ingress()(Door), name="door").options(
        num_replicas=options.doors, max_ongoing_requests=_DOOR, ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.drain,
    )  # fmt: skip
    return door.bind(options, *bound)


def _at_home(options: Options) -> Options:
    """Files and folders by their whole paths: replicas run in folders of their own."""
    told = {name: getattr(options, name) for name in ("model", "plan", "chat_template")}
    paths = {name: Path(path).resolve() for name, path in told.items() if path is not None and Path(path).exists()}
    if options.kept is not None and "://" not in options.kept:
        paths["store"] = Path(options.kept).resolve()
    called = {"name": options.name or options.model}
    return options.model_copy(update={**called, **{name: str(path) for name, path in paths.items()}})


def _scale(options: Options) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    config = AutoscalingConfig(
        min_replicas=options.min_replicas, initial_replicas=options.replicas, max_replicas=options.max_replicas,
        target_ongoing_requests=options.target or 0.75 * options.taken,
    )  # fmt: skip
    return {"autoscaling_config": config}
