"""What each KV head keeps: `HeadSpec` and `HeadPlan`, their files and pictures. No torch but in `rules`."""

from .plan import HeadPlan, HeadSpec

__all__ = ["HeadPlan", "HeadSpec"]
