"""EleutherAI's lm-evaluation-harness on a RedKnotCache: its tasks, scored and generated with a head plan.

    python -m evals.lm_eval_model run --model redknot --tasks arc_easy \\
        --model_args pretrained=evals/tiny,plan=evals/tiny/plan.json

Takes what `lm_eval` takes. Needs `pip install 'redknot-hf[lm-eval]'`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

Base: Any = HFLM  # a decorator hides its type


@register_model("redknot")
class RedKnotLM(Base):
    """A causal model of transformers whose every request is read into a fresh RedKnotCache.

    Args:
        pretrained: Folder, Hub id, or a model.
        plan: Path of a head plan, or a plan; by default all heads are global, which equals the dense cache.
        options: See `HFLM`.

    Raises:
        ValueError: The plan does not fit the model.
    """

    def __init__(self, pretrained: Any, plan: str | HeadPlan | None = None, **options: Any) -> None:
        if isinstance(pretrained, str):
            options.setdefault("attn_implementation", "redknot")
        super().__init__(pretrained=pretrained, **options)
        self.model.set_attn_implementation("redknot")
        if plan is None:
            plan = HeadPlan.uniform(self.config, HeadSpec())
        self.plan = plan if isinstance(plan, HeadPlan) else HeadPlan.load(plan, self.config)

    def new_cache(self) -> RedKnotCache:
        """Return a cache for one batch of requests."""
        return RedKnotCache(self.config, self.plan)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if attn_mask is not None or labels is not None:
            raise ValueError("RedKnotLM serves causal models, which get neither attn_mask nor labels")
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            # Rows are padded on the right, where no token that counts looks.
            return self.model(inps, **cache_argument(self.model, self.new_cache())).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = cache_argument(self.model, self.new_cache())
        return super()._model_generate(context, max_length, stop, **cache, **options)


if __name__ == "__main__":
    cli_evaluate()
