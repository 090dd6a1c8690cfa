"""What each KV head keeps: `HeadSpec` and `HeadPlan`, their files and pictures. No torch but in `rules`."""

from .plan import HeadPlan
from .spec import HeadSpec

__all__ = ["HeadPlan", "HeadSpec"]
