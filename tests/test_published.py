"""Plans that others have published: on the Hub, beside a model, and DuoAttention's scores."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.plan import duo_attention
from redknot_hf.plan.card import card
from redknot_hf.plan.duo_attention import MODELS, published
from redknot_hf.plan.published import Published, without_dtype
from redknot_hf.profiling import HeadProfile

ROOT = Path(__file__).parents[1]
CONFIG = SimpleNamespace(
    num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=4, hidden_size=64, name_or_path="org/Small-1B"
)
MODEL = SimpleNamespace(config=CONFIG, name_or_path="org/Small-1B-bf16")
PLAN = HeadPlan.with_global(CONFIG, [(0, 1)], HeadSpec(64, 4))


class Hub:
    """Repositories in memory, spoken to as the Hub is."""

    def __init__(self):
        self.files, self.commits, self.away = {}, [], False

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok

    def file_exists(self, repo_id, name, revision=None):
        return (repo_id, name) in self.files

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        for path in Path(folder_path).rglob("*.*"):
            self.files[repo_id, path.relative_to(folder_path).as_posix()] = path.read_text()
        self.commits.append(commit_message)
        return f"https://hub.example/{repo_id}/commit/{len(self.commits)}"

    def download(self, folder):
        def hf_hub_download(repo_id, name, revision=None, **options):
            if (repo_id, name) not in self.files:
                raise (LocalEntryNotFoundError if self.away else EntryNotFoundError)(name)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.files[repo_id, name])
            return str(path)

        return hf_hub_download


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download(tmp_path / "downloaded"))
    return made


def test_a_plan_goes_to_the_hub_and_comes_back(hub):
    assert issubclass(HeadPlan, Published)
    plan = HeadPlan(PLAN, provenance={"model": "org/Small-1B", "method": "drift"})
    assert plan.push_to_hub("org/plans") == "https://hub.example/org/plans/commit/1"
    names = {name for _, name in hub.files}
    assert names == {"README.md", "Small-1B/plan.json", "Small-1B/README.md"}
    assert hub.commits == ["Plan of org/Small-1B"]
    for model in (MODEL, CONFIG, "org/Small-1B", "Small-1B"):
        back = HeadPlan.from_pretrained("org/plans", model)
        assert (back, back.provenance) == (plan, plan.provenance)
    with pytest.raises(FileNotFoundError, match=re.escape("org/plans has no plan Other/plan.json or plan.json")):
        HeadPlan.from_pretrained("org/plans", "org/Other")
    hub.away = True
    with pytest.raises(FileNotFoundError, match="org/plans cannot be reached, and Other/plan"):
        HeadPlan.from_pretrained("org/plans", "org/Other")


def test_a_repository_keeps_its_own_card_and_other_plans(hub):
    hub.files["org/plans", "README.md"] = "ours"
    PLAN.push_to_hub("org/plans", folder="First-1B")
    PLAN.push_to_hub("org/plans", folder="Second-1B", commit_message="more")
    assert hub.files["org/plans", "README.md"] == "ours"
    assert HeadPlan.from_pretrained("org/plans", folder="First-1B") == PLAN
    assert hub.commits == ["Plan of First-1B", "more"]
    PLAN.push_to_hub("org/one", folder="")
    assert HeadPlan.from_pretrained("org/one") == HeadPlan.from_pretrained("org/one", MODEL) == PLAN
    with pytest.raises(ValueError, match="give folder="):
        PLAN.push_to_hub("org/plans")


def test_a_folder_stands_in_for_a_repository(tmp_path):
    (tmp_path / "Small-1B").mkdir()
    PLAN.save(tmp_path / "Small-1B" / "plan.json")
    assert HeadPlan.from_pretrained(tmp_path, MODEL) == PLAN
    with pytest.raises(FileNotFoundError, match=r"has no plan plan\.json"):
        HeadPlan.from_pretrained(tmp_path)
    other = SimpleNamespace(**{**vars(CONFIG), "num_hidden_layers": 3, "architectures": ["X"], "model_type": "x"})
    with pytest.raises(ValueError, match="the model \\(X / x\\) has 3 layers"):
        HeadPlan.from_pretrained(tmp_path, other)


def test_names_without_a_dtype():
    assert [without_dtype(name) for name in ("A-7B-bf16", "A-7B_FP16", "A-7B")] == ["A-7B"] * 3


def test_a_card_says_what_confirms_a_plan():
    profile = HeadProfile.load(ROOT / "evals" / "results" / "real" / "drift.json")
    said = card(profile.plan(budget=0.2), "org/plans")
    assert said.startswith("---\nlibrary_name: redknot-hf\n")
    assert "On prompts that were held out it holds at 7168 tokens." in said
    (held,) = profile.plan(budget=0.2).provenance["held_out"]
    right, dense = (f"{100 * held[name]:.1f}" for name in ("accuracy", "dense_accuracy"))
    assert f"| 7168 | all, {held['prompts']} | {held['kl']:.4f} | {right} | {dense} | **holds** |" in said
    assert "left out: the model itself cannot" in said
    assert 'HeadPlan.from_pretrained("org/plans", model)' in said
    assert "| budget | 0.2 |" in said
    bare = card(HeadPlan(PLAN, provenance={"model": "org/Small-1B"}))
    assert "base_model: org/Small-1B" in bare
    assert "Nothing confirms this plan" in bare


def test_duo_attention_by_the_name_of_a_model(monkeypatch, tmp_path):
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(duo_attention, "PATTERNS", "memory://patterns")
    where = f"/patterns/{MODELS['Llama-3.1-8B-Instruct']}"
    files.pipe(f"{where}/full_attention_heads.tsv", b"0.1\t0.9\n0.7\t0.2\n")
    files.pipe(f"{where}/config.json", json.dumps({"sink_size": 16, "recent_size": 64}).encode())
    names = ("Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct", f"memory:/{where}")
    for name in (*names, f"memory:/{where}/full_attention_heads.tsv"):
        plan = HeadPlan.from_duo_attention(name, global_ratio=0.5)
        assert [[spec.is_global for spec in layer] for layer in plan] == [[False, True], [True, False]]
        assert plan[0][0] == HeadSpec(64, 16)
    assert published("org/Other-8B") is None
    with pytest.raises(FileNotFoundError, match="Other-8B: no such file, and no model with published scores: Llama-2"):
        HeadPlan.from_duo_attention("Other-8B", global_ratio=0.5)
    files.pipe(f"{where}/full_attention_heads.tsv", b"0.1\tx\n")
    with pytest.raises(ValueError, match=re.escape(f"memory:/{where}/full_attention_heads.tsv: line 1")):
        HeadPlan.from_duo_attention(names[0], global_ratio=0.5)
    files.rm(f"{where}/config.json")
    with pytest.raises(FileNotFoundError, match=re.escape("config.json is missing")):
        HeadPlan.from_duo_attention(names[0], global_ratio=0.5)
