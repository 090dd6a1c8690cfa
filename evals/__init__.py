"""Evidence: what a plan costs in fidelity, and what it gives in memory and time.

`evals.gate(model, plan, ...)` passes or fails a plan; `python -m evals --help` does the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.fidelity_gate import gate

__all__ = ["gate"]


def __getattr__(name: str) -> Any:
    # On demand, because the worker that runs kvpress imports this package where redknot_hf cannot be installed.
    if name == "gate":
        from evals.fidelity_gate import gate

        return gate
    raise AttributeError(f"module 'evals' has no attribute {name!r}")
