import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from redknot_cli import app, loading, options
from redknot_cli.gate import gate
from redknot_cli.harness import bench, evaluate
from redknot_cli.loading import Source
from redknot_cli.plans import plans
from redknot_cli.profile import profile
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import HeadProfile
from redknot_hf.profiling.fidelity import MAX_KL

SHORT = ("--kinds", "repeats", "--length", "100")
ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "evals" / "tiny")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    result = run(
        *("profile", TINY, "--out", folder / "plan.json", "--budget", 0.4, "--windows", "32,128"),
        *("--length", 256, "--prompts", 4, "--kinds", "repeats", "--check-length", 384),
        *("--profile-out", folder / "profile.json", "--figure", folder / "heat.png", "--dtype", "float32"),
        *("--card", folder / "card.md"),
    )
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_profile_writes_a_plan_with_its_provenance(written):
    folder, output = written
    plan = HeadPlan.load(folder / "plan.json")
    assert plan.nbytes(256, 32, 4) <= 0.4 * 32 * 256 * 64 * 4
    assert plan.provenance["model"] == "tiny", "of a folder its name only"
    assert [found["length"] for found in plan.provenance["held_out"]] == [256, 384]
    assert plan.provenance["calibration"]["prompts"] == 3
    assert "held out, 384 tokens: KL" in output
    assert "# A head plan of tiny" in (folder / "card.md").read_text()
    assert (folder / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_spread_over_devices_or_shared_by_ranks(monkeypatch):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda name, **options: options)
    assert Source(TINY, device="auto").model()["device_map"] == "auto"
    shared = Source(TINY).model(ranks=2)
    assert shared["device_map"] is None
    assert (shared["distributed_config"].tp_size, shared["distributed_config"].tp_plan) == (2, "auto")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"redknot-hf\[offload\]"):
        Source(TINY, device="auto")


def test_a_profile_converts_to_plans_for_other_budgets(written, tmp_path):
    folder, _ = written
    result = run("plan", "convert", folder / "profile.json", "--out", tmp_path / "plan.json", "--global-ratio", 0.75)
    assert result.exit_code == 0, result.output
    assert HeadPlan.load(tmp_path / "plan.json").num_global == 24
    assert HeadPlan.load(tmp_path / "plan.json") == HeadProfile.load(folder / "profile.json").plan(global_ratio=0.75)


def test_a_plan_for_another_budget_carries_no_confirmation_of_the_first(written, tmp_path):
    folder, output = written
    assert "bytes kept of 256 tokens, and drift foretold" in output
    assert "repeats  KL" in output
    path = tmp_path / "plan.json"
    for budget, confirmed in ((0.4, True), (0.3, False)):
        result = run("plan", "convert", folder / "profile.json", "--out", path, "--budget", budget)
        assert result.exit_code == 0, result.output
        assert ("held_out" in HeadPlan.load(path).provenance) == confirmed
        assert ("held out, 256 tokens: KL" in result.output) == confirmed
    result = run("plan", "convert", folder / "profile.json", "--out", path, "--budget", 0.3, "--length", 4096)
    assert HeadPlan.load(path).nbytes(4096, 32, 4) <= 0.3 * 32 * 4096 * 64 * 4
    assert HeadPlan.load(path).num_global > 0


def test_without_a_budget_the_smallest_plan_that_holds_is_found(tmp_path):
    result = run(
        *("profile", TINY, "--out", tmp_path / "plan.json", "--windows", "32,128", "--max-kl", 0.02),
        *("--length", 256, "--prompts", 8, "--kinds", "repeats", "--dtype", "float32"),
    )
    assert result.exit_code == 0, result.output
    plan = HeadPlan.load(tmp_path / "plan.json")
    (row,) = plan.provenance["held_out"]
    assert row["holds"]
    assert row["kl"] <= 0.02
    assert plan.provenance["budget"] < 1
    gated = ("gate", TINY, "--plan", tmp_path / "plan.json", "--length", 256, "--kinds", "repeats", "--prompts", 2)
    passed = run(*gated, "--max-kl", 0.1)
    assert (passed.exit_code, ": holds" in passed.output) == (0, True), passed.output
    failed = run(*gated, "--max-kl", 1e-9)
    assert (failed.exit_code, "does not hold" in failed.output) == (1, True), failed.output


def test_duo_attention_scores_convert(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\t0.9\n0.7\t0.2\n")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 16, "recent_size": 64}))
    result = run("plan", "convert", tmp_path, "--out", tmp_path / "plan.json", "--threshold", 0.8)
    assert result.exit_code == 0, result.output
    assert HeadPlan.load(tmp_path / "plan.json").num_global == 1


def test_show_prints_heads_and_provenance():
    result = run("plan", "show", f"{TINY}/plan.json")
    assert result.exit_code == 0
    assert "8 layers x 4 KV heads, 10 global" in result.output
    assert "method: trained with this plan" in result.output


def test_diff_names_the_heads_that_differ(tmp_path):
    heads = [list(layer) for layer in HeadPlan.load(f"{TINY}/plan.json")]
    heads[1][2] = HeadSpec()
    HeadPlan(heads).save(tmp_path / "other.json")
    result = run("plan", "diff", f"{TINY}/plan.json", tmp_path / "other.json")
    assert result.exit_code == 1
    assert "1 of 32 heads differ; overlap of global heads (Jaccard) 0.91" in result.output
    assert "4 + 128" in result.output
    stored = HeadPlan.load(tmp_path / "other.json").stored("int8", heads=[(1, 2)])
    stored.save(tmp_path / "stored.json")
    result = run("plan", "diff", tmp_path / "other.json", tmp_path / "stored.json")
    assert "1 of 32 heads differ" in result.output
    assert "global, int8" in result.output
    same = run("plan", "diff", f"{TINY}/plan.json", f"{TINY}/plan.json")
    assert same.exit_code == 0
    assert "0 of 32 heads differ" in same.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", TINY, "--out", "x.json", "--max-kl", "0", *SHORT), "max_kl=0"),
        (("profile", TINY, "--out", "x.json", "--budget", "0.5", "--windows", "12,x"), "--windows 12,x: give numbers"),
        (
            ("profile", TINY, "--out", "x.json", "--budget", "0.5", *SHORT, "--windows", "128"),
            "100 tokens",
        ),
        (("plan", "show", "nowhere.json"), "nowhere.json"),
        (("plan", "convert", f"{TINY}/plan.json", "--out", "x.json", "--budget", "0.5"), "budget is for profiles"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", "")


@pytest.mark.filterwarnings("default:the tokenizer has no words:UserWarning")
def test_the_bundled_model_is_profiled_in_the_words_that_it_has(tmp_path):
    result = run(
        *("profile", TINY, "--out", tmp_path / "plan.json", "--budget", 0.3, "--dtype", "float32"),
        *("--length", 400, "--prompts", 6, "--windows", "64"),
    )
    assert result.exit_code == 0, result.output
    assert "warning: the tokenizer has no words for passkey, pairs, two_hop, copy, home, boat" in result.output
    (held,) = HeadPlan.load(tmp_path / "plan.json").provenance["held_out"]
    (codes,) = (row for row in held["kinds"] if "codes" in row.values())
    assert codes["dense_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:99"), "--device cuda:99: "),
        (("--device", "teapot"), "--device teapot: "),
        (("--dtype", "flaot32"), "--dtype flaot32: give auto, float32, bfloat16 or float16"),
        (("--dtype", "nn"), "--dtype nn: give auto"),
        (("--windows", "128;256"), "--windows 128;256: give numbers of tokens with commas between"),
        (("--budget", "5"), "budget is 5.0: give a share from 0 to 1"),
        (("--method", "drfit"), "--method drfit: choose one of drift"),
        (("--out", "no-folder/x.json"), "--out no-folder/x.json: there is no folder no-folder; make it"),
        (("--figure", "x.png"), "a heat map needs matplotlib: pip install 'redknot-hf[plot]'"),
    ],
)
def test_what_is_off_is_said_before_anything_is_loaded(options, message, monkeypatch):
    monkeypatch.setattr("redknot_hf.profiling.figure.find_spec", lambda name: None)
    result = run("profile", "no-such/model", "--out", "plan.json", *options)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    assert message in result.output
    assert "Traceback" not in result.output


def test_memory_that_runs_out_is_told_in_a_line(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("profile by drift")

    monkeypatch.setattr("redknot_hf.profiling.profile_heads", full)
    result = run("profile", TINY, "--out", tmp_path / "plan.json", "--length", 400, "--kinds", "repeats")
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert result.output.splitlines()[-1] == "error: profile by drift"


@pytest.mark.parametrize("command", [("plan", "show"), ("plan", "diff", f"{TINY}/plan.json"), ("plan", "convert")])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a page", "is not JSON"),
        ("[1]", "holds [1], not an object"),
        ("[" * 100_000, "is not JSON"),
        (None, "No such"),
    ],
)
def test_files_that_hold_no_plan_are_named(command, text, message, tmp_path):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    result = run(*command, path, *(("--out", tmp_path / "out.json") if command[-1] == "convert" else ()))
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    assert message in result.output
    assert str(path) in result.output


def test_help_imports_no_library_of_models():
    """Each takes a second or more, and help has half of one."""
    program = """
import sys
from redknot_cli import app
for words in ([], ["profile"], ["gate"], ["plan"], ["plan", "diff"], ["serve"], ["eval"], ["eval", "run"], ["bench"],
              ["bench", "speed_gpu"], ["eval", "serve"]):
    if words == ["eval"]:
        assert "evals" not in sys.modules
    try:
        app([*words, "--help"])
    except SystemExit as left:
        assert left.code == 0, words
heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib", "redknot_hf"} & sys.modules.keys()
assert not heavy, heavy
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    for said in ("Compare two plans", "Draw fidelity over resident bytes", "examples of each task", "speed_gpu"):
        assert said in told.stdout


def test_the_words_of_the_command():
    found = {info.callback for info in app.registered_commands}
    assert {profile, evaluate, gate, bench} <= found
    assert [group.typer_instance for group in app.registered_groups] == [plans]


def test_the_version_is_the_packages():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"redknot-hf {version('redknot-hf')}\n")


def test_a_bound_of_the_command_is_the_librarys():
    assert options.MAX_KL == MAX_KL


def test_the_harness_is_two_of_its_words():
    assert run("eval", "run", "--help").exit_code == 0
    assert "tokens of a prompt, at most" in run("eval", "run", "--help").output
    assert "speed_gpu" in run("bench", "--help").output
    assert "spede is none of" in " ".join(re.findall(r"\w+", run("bench", "spede").output))  # whatever the lines


def test_another_package_of_the_harness_name_is_told(monkeypatch, tmp_path):
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "evals"]:
        monkeypatch.delitem(sys.modules, name)
    result = run("eval", "tasks")
    assert result.exit_code == 2
    assert f"{tmp_path}/evals/__init__.py is another package" in result.output.replace("\n", "")


def test_a_gguf_file_is_named_to_tokenizer_and_model(monkeypatch):
    asked = []
    for kind in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(
            f"redknot_cli.loading.{kind}.from_pretrained",
            lambda name, **options: asked.append((name, options["gguf_file"])) or torch.nn.Linear(1, 1),
        )
    source = Source("org/model", gguf="model-q8.gguf", device="cpu")
    source.tokenizer(), source.model()
    assert asked == [("org/model", "model-q8.gguf")] * 2
    monkeypatch.setattr("redknot_cli.loading.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'redknot-hf[gguf]'")):
        Source("org/model", gguf="model-q8.gguf", device="cpu")
