"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="File to write the plan to.")]
Budget = Annotated[float | None, typer.Option(help="Share of the dense cache's bytes to keep, 0 to 1.")]
Ratio = Annotated[float | None, typer.Option(help="Share of the KV heads that are global, 0 to 1.")]
Bytes = Annotated[float | None, typer.Option(help="Bytes a token to keep, all heads together.")]
Model = Annotated[str, typer.Argument(help="Id on the Hub, or a folder.")]
Kinds = Annotated[str | None, typer.Option(help="Of passkey,pairs,two_hop,repeats,text,copy,home; all by default.")]
Texts = Annotated[str | None, typer.Option(help="Texts to ask in: a file, or a data set's id on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Of the model.")]
Gguf = Annotated[str | None, typer.Option(help="File of the model's folder or repository, in the GGUF format.")]
Dtype = Annotated[str, typer.Option(help="Of the model.")]
Device = Annotated[str | None, typer.Option(help="By default a GPU if there is one; auto: layers over all.")]
Seed = Annotated[int, typer.Option(help="Of the prompts.")]
# As profiling.fidelity.MAX_KL, which imports torch.
MAX_KL = 0.05
MaxKL = Annotated[float, typer.Option(help="KL, nats a token, that a plan which holds may be off.")]
