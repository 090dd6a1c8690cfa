"""What an application is told: by arguments of `serve run`, or by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from redknot_hf.serving.sizes import is_share


class Options(BaseModel):
    """Of an application.

    Attributes:
        model, revision, dtype, device: Name or folder of the model, and how it is loaded.
        plan: File of a plan.
        store: Where documents are: a folder or URL that all replicas share, `memory` for each its own, or nothing.
        name, api_key, no_auth, timeout, max_body, chat_template: As of `redknot serve`. Without a key, and unless it
            is said that none is needed, only clients that call the server by a name of this machine are let in.
        memory, max_batch, max_len, chunk, preempt, parked: Of each replica's engine, as of `redknot serve`.
        queue: Answers that may be under way and wait, at most; other clients are told to come again.
        replicas: That answer.
        max_replicas, min_replicas: If the first is given, so many, as many requests as there are; `replicas` at first.
        target: Requests under way in a replica that autoscaling aims at; three quarters of `most` by default.
        most: Requests that a replica takes at once; `max_batch` by default. At as many others are asked.
        prefill: Replicas that only read prompts; they need a `store` that is shared.
        prefill_from: Tokens of a prompt from which on it is read by them.
        doors: Replicas of the door.
        cpus, gpus: Of each replica that answers or reads; a GPU by default where there are some.
        look: Seconds after which a replica's load and what it holds are looked at again.
        health: Seconds after which it is asked whether it lives.
        drain: Seconds that answers may take when a replica is to end; others go on with what is left.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    plan: str
    store: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    name: str | None = None
    api_key: str | None = Field(None, repr=False)
    no_auth: bool = False
    timeout: PositiveFloat | None = None
    max_body: PositiveInt = 8 << 20
    chat_template: str | None = None
    memory: str | float = "0.9"
    max_batch: PositiveInt = 32
    max_len: PositiveInt | None = None
    chunk: PositiveInt = 2048
    preempt: Literal["swap", "recompute", "none"] = "swap"
    parked: float = Field(0.5, ge=0, le=1)
    queue: PositiveInt = 1024
    replicas: PositiveInt = 1
    min_replicas: int = Field(1, ge=0)
    max_replicas: PositiveInt | None = None
    target: PositiveFloat | None = None
    most: PositiveInt | None = None
    prefill: int = Field(0, ge=0)
    prefill_from: int = Field(1024, ge=2)
    doors: PositiveInt = 1
    cpus: float = Field(1, ge=0)
    gpus: float | None = Field(None, ge=0)
    look: PositiveFloat = 1
    health: PositiveFloat = 10
    drain: PositiveFloat = 30

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Options:
        """As `serve run` gives them, in front of the environment.

        Raises:
            ValueError: One is off, is missing, or is none of these.
        """
        named = {name: f"REDKNOT_{name.upper()}" for name in cls.model_fields}
        told = {name: os.environ[variable] for name, variable in named.items() if variable in os.environ}
        try:
            return cls(**{**told, **args})
        except ValidationError as e:
            raise ValueError("; ".join(map(_said, e.errors()))) from e

    @field_validator("memory")
    @classmethod
    def _bytes(cls, memory: str | float) -> str | float:
        is_share(memory)
        return memory

    @field_validator("device")
    @classmethod
    def _place(cls, device: str | None) -> str | None:
        if device == "auto":
            raise ValueError(
                "device='auto' spreads layers, and a replica has one device: give cuda or cpu, or nothing"
            )
        try:
            found = device is None or torch.device(device).type != "meta"
        except RuntimeError:
            found = False
        if not found:
            raise ValueError(f"device={device!r} is none: give cuda or cpu, or leave it out")
        return device

    @model_validator(mode="after")
    def _fits(self) -> Options:
        if self.prefill and self.store in (None, "memory"):
            raise ValueError(
                "prefill needs a store that all replicas share: give store=redis://..., s3://... or a folder"
            )
        if self.max_replicas is not None and not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"replicas={self.replicas} lies outside of min_replicas={self.min_replicas} and "
                f"max_replicas={self.max_replicas}"
            )
        return self

    @property
    def taken(self) -> int:
        """Requests that a replica takes at once."""
        return self.most or self.max_batch

    @property
    def kept(self) -> str | None:
        """Folder or URL of the store."""
        return None if self.store == "memory" else self.store


def _said(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such argument; there are {', '.join(Options.model_fields)}"
    if error["type"] == "missing":
        return f"{name} is missing: give {name}=..., or set REDKNOT_{name.upper()}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name and not message.startswith(name) else message
