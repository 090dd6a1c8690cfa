"""Trains the bundled model, from nothing or from given weights, on one GPU, within a given time.

    python -m evals.tiny.train --out runs/tiny --minutes 8
    python -m evals.tiny.train --out runs/plain --minutes 8 --plain
    python -m evals.tiny.train --out runs/more --minutes 8 --init evals/tiny --skip 0.03

Writes the best model so far (by held-out accuracy) to `OUT/model.safetensors`, the state to go on from to
`OUT/checkpoint`, and at the end `OUT/evaluation.json`, of which `python -m evals.tiny.card` makes the model card's
tables. Started again with the same `--out` it goes on where it stopped. Every second step trains with the plan's
mask, so that the heads that the plan calls local need no more than their window; `--plain` never does.
"""

import argparse
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from evals.tiny import checkpoint
from evals.tiny.curriculum import Lessons, Orders, load
from evals.tiny.examination import Score, evaluate, grade, set_exams, total
from evals.tiny.network import Network
from evals.tiny.settings import Settings
from evals.tiny.stretch import Stretch
from redknot_hf import HeadPlan

TINY = Path(__file__).parent
REPORTS = 40  # a training, evenly spread over it
CHECKPOINT_EVERY = 4  # reports
WARM_UP = 200  # steps
FINAL_RATE = 0.03  # of the peak


class Training:
    """A training that can be stopped and gone on with.

    Args:
        settings: What decides it.
        out: Folder of its files. A state in it is gone on from.
        device: Where to train.
        init: Folder with the first weights, `model.safetensors`; by default they are random.
        compiled: Compile what can be.
        workers: Processes that make texts.
        held_out: Plain answers that each report asks for at each length, and half as many dependent ones.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        device: str = "cuda",
        init: Path | None = None,
        compiled: bool = True,
        workers: int = 14,
        held_out: int = 240,
    ) -> None:
        self.settings, self.out, self.device, self.workers = settings, out, torch.device(device), workers
        self.step, self.tokens, self.best = 0, 0, -1.0
        self.history: list[dict[str, Any]] = []
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model = first_model(settings.seed, init)
        nn.Module.to(model, self.device)
        self.plan = HeadPlan.load(TINY / "plan.json", model.config)
        self.network = Network(model, self.plan, dtype, compiled)
        self.optimizer = _optimizer(model, settings.rate)
        self.started = time.monotonic()
        if (out / "checkpoint" / checkpoint.INDEX).exists():
            self._restore()
        self.exams = {
            length: set_exams(length, "plain", held_out, seed=0)
            + set_exams(length, "dependent", held_out // 2, seed=0)
            for length in (256, 1024, 4096, 8192)
            if length <= settings.max_length
        }

    def run(self, stop: int | None = None) -> None:
        """Train until the budget is used up, or until step `stop`."""
        lessons = Lessons(self.settings.tokens, self.settings.seed)
        orders = Orders(self.step, self._lesson, self.settings.max_length, self.settings.seed)
        stream = load(lessons, orders, self.workers, pin=self.device.type == "cuda")
        stretch = Stretch(self.device)
        while self.step != stop and self.progress(self.step) < 1:
            due = math.floor(self.progress(self.step) * REPORTS) + 1
            stretch.wait()
            ids, weights = next(stream)
            stretch.go()
            stretch.add(self._learn(ids, weights), ids.numel())
            if self.progress(self.step) * REPORTS >= due:
                self._report(stretch)
                stretch = Stretch(self.device)
                if len(self.history) % CHECKPOINT_EVERY == 0:
                    self.save()
        if self.progress(self.step) >= 1:
            if stretch.steps:
                self._report(stretch)
            self.save()

    def progress(self, step: int) -> float:
        """Share of the budget that is used up at this step, now."""
        if self.settings.steps is not None:
            return step / self.settings.steps
        assert self.settings.minutes is not None
        return (time.monotonic() - self.started) / (60 * self.settings.minutes)

    def save(self) -> None:
        """Write the state that a restart goes on from."""
        training = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(time.monotonic() - self.started, 1),
            "best": self.best,
            "settings": asdict(self.settings),
            "history": self.history,
        }
        checkpoint.save(self.out / "checkpoint", self.network.model, self.optimizer, training)

    def finish(self, lengths: list[int], n_answers: int) -> dict[str, Any]:
        """Evaluate the best model, as it is stored, write `evaluation.json` and return what it holds."""
        model = LlamaForCausalLM(self.network.model.config)
        _load_weights(model, self.out / "model.safetensors")
        nn.Module.to(model, self.device)
        network = Network(model, self.plan, self.network.dtype, compiled=False)
        seconds = time.monotonic() - self.started
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()
        result = {
            "training": {
                **asdict(self.settings), "steps": self.step, "tokens": self.tokens, "minutes": round(seconds / 60, 2),
                "device": device, "torch": torch.__version__, "transformers": transformers.__version__,
            },
            "bytes": (self.out / "model.safetensors").stat().st_size,
            "lengths": evaluate(network, lengths, n_answers, seed=1, plain=self.settings.plain),
        }  # fmt: skip
        checkpoint.write_json(self.out / "evaluation.json", result)
        return result

    def _lesson(self, step: int) -> float:
        """Place in the curriculum at this step, now."""
        return self.settings.skip + (1 - self.settings.skip) * self.progress(step)

    def _learn(self, ids: Tensor, weights: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        ids = ids.to(self.device, non_blocking=True).long()
        weights = weights.to(self.device, non_blocking=True).float()
        planned = not self.settings.plain and self.step % 2 == 1
        loss = self.network.loss(ids, weights, planned)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        return loss.detach()

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP)
        cosine = (1 + math.cos(math.pi * min(1.0, self.progress(self.step)))) / 2
        return self.settings.rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

    def _report(self, stretch: Stretch) -> None:
        """Print one line about the steps since the last report, and keep the model if it is the best so far."""
        figures = stretch.figures()
        if not math.isfinite(figures["loss"]):
            raise RuntimeError(f"the loss is {figures['loss']} at step {self.step}: lower --rate")
        modes = {"dense": False} if self.settings.plain else {"dense": False, "plan": True}
        marks: dict[str, dict[int, float]] = {mode: {} for mode in modes}
        kinds: dict[str, dict[int, Score]] = {}
        for mode, planned in modes.items():
            for length, exams in self.exams.items():
                scores = grade(self.network, exams, planned)
                marks[mode][length] = total(scores.values()).accuracy
                for kind, score in scores.items():
                    marked = kinds.setdefault(kind, {})
                    marked[length] = marked.get(length, Score()) + score
        worst = [min(marks[mode][length] for mode in modes) for length in self.exams]
        if (mean := sum(worst) / len(worst)) > self.best:
            self.best = mean
            self._keep()
        self.history.append({"step": self.step, **figures, "rate": self._rate(), **marks})
        line = f"step {self.step} {self.progress(self.step):.0%} rate {self._rate():.1e} loss {figures['loss']:.4f}"
        line += f" {figures['tokens_per_second'] / 1e6:.2f} Mtok/s wait {figures['waited']:.0%}"
        for mode in modes:
            line += f" | {mode} " + " ".join(f"{length}:{mark:.3f}" for length, mark in marks[mode].items())
        line += " | " + " ".join(
            f"{kind} {'/'.join(f'{score.exact:.2f}' for score in marked.values())}"
            for kind, marked in sorted(kinds.items())
        )
        print(line, flush=True)

    def _keep(self) -> None:
        weights = self.network.model.state_dict()
        weights.pop("lm_head.weight")  # tied to the embedding
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(
            self.out / "model.safetensors", {k: w.to(torch.bfloat16) for k, w in weights.items()}
        )  # fmt: skip

    def _restore(self) -> None:
        folder = self.out / "checkpoint"
        self.settings.check_same(checkpoint.read_index(folder)["settings"])
        training = checkpoint.restore(folder, self.network.model, self.optimizer)
        self.step, self.tokens, self.best = training["step"], training["tokens"], training["best"]
        self.history = training["history"]
        self.started -= training["seconds"]
        print(f"going on from step {self.step} of {folder}", flush=True)


def first_model(seed: int, init: Path | None) -> LlamaForCausalLM:
    """Return the model to begin with, in float32: random, or with the weights in a folder.

    Raises:
        FileNotFoundError: The folder holds no `model.safetensors`.
        ValueError: The weights are of another shape of model.
    """
    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(TINY)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config).float()
    if init is not None:
        _load_weights(model, init / "model.safetensors")
    return model


def _load_weights(model: LlamaForCausalLM, path: Path) -> None:
    weights = load_file(path)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise ValueError(f"{path} does not hold the weights of evals/tiny/config.json")
    model.load_state_dict(weights, strict=False)  # what is missing is the output layer, which is tied


def _optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def main(argv: list[str] | None = None) -> None:
    """Trains and evaluates as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; a training in it goes on")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="time to train, the final evaluation (below a minute) not in it")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--plain", action="store_true", help="never train with the plan's mask")
    parser.add_argument("--init", type=Path, help="folder with a model.safetensors to begin with")
    parser.add_argument("--skip", type=float, default=0.0, help="share of the curriculum to leave out at its start")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step")
    parser.add_argument("--max-length", type=int, default=8192, help="leave longer texts out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--workers", type=int, default=14, help="processes that make texts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="to evaluate at")
    parser.add_argument("--answers", type=int, default=1000, help="held-out answers a length, and as many dependent")
    parser.add_argument("--held-out", type=int, default=240, help="answers a length that each report asks for")
    args = parser.parse_args(argv)
    budget = (args.minutes, args.steps)
    settings = Settings(*budget, args.plain, args.rate, args.tokens, args.max_length, args.seed, args.skip)
    compiled = not args.no_compile
    training = Training(settings, args.out, args.device, args.init, compiled, args.workers, args.held_out)
    training.run()
    result = training.finish(args.lengths, args.answers)
    for length, parts in result["lengths"].items():
        modes = {mode: kinds["all"]["accuracy"] for mode, kinds in parts["plain"].items()}
        print(length, *(f"{mode} {accuracy:.4f}" for mode, accuracy in modes.items()))


if __name__ == "__main__":
    main()
