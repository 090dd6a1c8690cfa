"""Plans on the Hub: a repository holds plans of several models, each in a folder of the model's name, with its card.

The folder of `HuggingFaceTB/SmolLM2-135M-Instruct` is `SmolLM2-135M-Instruct`, and holds `plan.json` and `README.md`.
A repository of one plan may have both at its top. A folder on this machine may stand in for a repository.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import card, cover
from .formats import AnyPath

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PLAN, CARD = "plan.json", "README.md"
_DTYPE_SUFFIX = re.compile(r"[-_.](bf16|fp16|fp32|f16|f32|bfloat16|float16|float32)$", re.I)


class Published:
    """How a plan comes from the Hub and goes there."""

    provenance: Mapping[str, Any]

    @classmethod
    def from_pretrained(
        cls, name: AnyPath, model: Any = None, *, folder: str | None = None, revision: str | None = None, **hub: Any
    ) -> Any:
        """Load a model's plan of a repository on the Hub, or of a folder: `from_pretrained("org/plans", model)`.

        Args:
            name: Id of the repository, or a folder.
            model: The model, its config or its id: says whose plan is wanted, and a model or config is checked against
                the plan as `load` does. None takes the plan at the top.
            folder: Of the plan within the repository, where it has another name than the model.
            revision: Of the repository.
            hub: As `huggingface_hub.hf_hub_download` has them: `token`, `cache_dir`, `local_files_only` and so on.

        Raises:
            FileNotFoundError: There is no plan of this model, or the Hub cannot be reached; the message says where the
                plan was looked for.
            ValueError: The plan is damaged, or does not fit the model.
        """
        config = getattr(model, "config", model)
        places = [folder] if folder is not None else _folders(model)
        files = [f"{place}/{PLAN}" if place else PLAN for place in places]
        path = _found(name, files, {"revision": revision, **hub})
        return cls.load(path, None if isinstance(model, str) else config)  # pyright: ignore[reportAttributeAccessIssue]

    def push_to_hub(
        self, repo_id: str, *, folder: str | None = None, private: bool | None = None, token: str | bool | None = None,
        revision: str | None = None, commit_message: str | None = None, api: HfApi | None = None,
    ) -> str:  # fmt: skip
        """Write the plan and its card to a repository on the Hub, which is made if it is not there.

        What the repository holds of other models stays. A repository without a card of its own gets one.

        Args:
            repo_id: Such as `org/plans`.
            folder: Of the plan; by default the name of the model that it was made for, `""` is the top.
            private, token, revision, commit_message: As `huggingface_hub.HfApi` has them.
            api: To talk to; by default the Hub's.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: No folder is given, and the plan does not say whose it is.
        """
        from huggingface_hub import HfApi

        model = self.provenance.get("model")
        if folder is None:
            if not model:
                raise ValueError("the plan does not say which model it is of: give folder=..., the model's name")
            folder = Path(str(model)).name
        api = HfApi(token=token) if api is None else api
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as made:
            top, place = Path(made), Path(made, folder)
            place.mkdir(exist_ok=True)
            self.save(place / PLAN)  # pyright: ignore[reportAttributeAccessIssue]
            (place / CARD).write_text(card(self, repo_id), encoding="utf-8")
            if folder and not api.file_exists(repo_id, CARD, revision=revision):
                (top / CARD).write_text(cover(repo_id), encoding="utf-8")
            message = commit_message or f"Plan of {model or folder}"
            return str(api.upload_folder(
                repo_id=repo_id, folder_path=made, revision=revision, commit_message=message
            ))  # fmt: skip


def without_dtype(name: str) -> str:
    """A model's name without the dtype that folders are often called by."""
    return _DTYPE_SUFFIX.sub("", name)


def _folders(model: Any) -> list[str]:
    """Where a model's plan may be: under its name, under the name without a dtype, at the top."""
    if model is None:
        return [""]
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    last = Path(name).name
    return list(dict.fromkeys([last, without_dtype(last), ""]))


def _found(name: AnyPath, files: Sequence[str], options: Mapping[str, Any]) -> Path:
    """The first of these files that a folder or a repository has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    looked_for, missing = " or ".join(files), None
    for file in files:
        if Path(name).is_dir():
            if Path(name, file).exists():
                return Path(name, file)
            continue
        try:
            return Path(hf_hub_download(str(name), file, **options))
        except EntryNotFoundError as e:
            missing = e
    if isinstance(missing, LocalEntryNotFoundError):
        raise FileNotFoundError(f"{name} cannot be reached, and {looked_for} was not downloaded before") from missing
    raise FileNotFoundError(
        f"{name} has no plan {looked_for}: give folder=..., or make one: redknot profile MODEL --out FILE"
    ) from missing
