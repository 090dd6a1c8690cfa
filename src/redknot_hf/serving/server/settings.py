"""What a server is told: its model's name, its key, and what it takes of a client at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        name: What clients call the model.
        key: What they must bring as `Authorization: Bearer KEY`; `None` asks for none.
        hosts: Names by which the server may be called, so that no web page reaches it under a name of its own; none
            given, any.
        max_body: Bytes of a request.
        max_answers: Answers that a request asks for, prompts times `n`.
        patience: Seconds in which a request's body must have come.
        timeout: Seconds after which an answer is given up, waiting included; `None` never.
        chat_template: Instead of the tokenizer's own.
    """

    name: str
    key: str | None = None
    hosts: Sequence[str] = ()
    max_body: int = 8 << 20
    max_answers: int = 128
    patience: float | int = 30
    timeout: float | int | None = None
    chat_template: str | None = None


def check_door(host: str, key: str | None, no_auth: bool) -> Sequence[str]:
    """Checks who may come in where a server listens, and gives the names by which it may be called.

    Args:
        host: Where it listens.
        key: What clients must bring.
        no_auth: That nobody needs a key was said aloud.

    Raises:
        ValueError: Others than this machine could come in, and need no key; or the key is none.
    """
    if key is not None and not (key.isascii() and key.strip() == key != ""):
        raise ValueError("--api-key is empty, or has spaces around it or letters beyond ASCII: give another one")
    if key is not None and no_auth:
        raise ValueError("--api-key and --no-auth: give one of them")
    if key is not None or no_auth:
        return ()
    if not is_loopback(host):
        raise ValueError(
            f"--host {host} lets other machines in: say --api-key KEY (or set REDKNOT_API_KEY), or --no-auth if "
            "anyone who reaches it may use it"
        )
    return LOOPBACK


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
