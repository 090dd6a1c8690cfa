import pytest
import torch
from families import make_model
from oracle import random_plan
from texts import LONG, texts
from typer.testing import CliRunner

from redknot_cli import app
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import calibration_prompts
from redknot_hf.reuse.trial import Context, reuse_costs


def test_a_text_is_cut_into_documents_and_what_is_asked():
    ids, answers = torch.arange(200), [150, 151, 160, 170]  # questions of nine tokens
    context = Context.of(ids, torch.tensor(answers), documents=4)
    assert [*context.opening, *(token for d in context.documents for token in d), *context.asked] == [*range(200)]
    assert context.asked[0] == 150 - 10
    assert len(context.documents) == 4
    assert context.question == [i for i in range(140, 200) if i not in answers]
    for targets, documents in ((answers, 200), ([3], 8)):
        with pytest.raises(ValueError, match=f"give {documents} documents more"):
            Context.of(ids, torch.tensor(targets), documents)


def test_the_more_is_recomputed_the_nearer_to_reading_everything():
    model = make_model("llama", **LONG)
    plan = random_plan(model.config, seed=1)
    contexts = []
    for seed in range(2):
        documents = texts((40, 60, 50), seed)
        asked = torch.tensor([token for document in documents for token in document] + [5, 6, 7])
        contexts.append(Context([3, 4], documents, asked.tolist(), torch.arange(len(asked)) >= len(asked) - 2))
    none, some, everything = reuse_costs(model, plan, contexts, shares=(0, 0.5, 1))
    assert none.recomputed == 0 < some.recomputed <= 0.5 < 0.95 < everything.recomputed <= 1
    assert none.kl > 1e-4 > 1e-6 > everything.kl
    assert everything.agreement == 1
    assert "0% recomputed: KL" in str(none)


def test_the_gate_says_what_share_is_needed(tmp_path, byte_tokenizer):
    model = make_model("llama", vocab_size=700, num_hidden_layers=2, max_position_embeddings=8192)
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    HeadPlan.uniform(model.config, HeadSpec()).save(tmp_path / "plan.json")
    assert calibration_prompts(byte_tokenizer, length=2048, count=1, kinds=["passkey"])
    gate = ["gate", str(tmp_path), "--plan", str(tmp_path / "plan.json"), "--reuse", "--dtype", "float32"]
    gate += ["--length", "2048", "--prompts", "1", "--device", "cpu"]
    passed = CliRunner().invoke(app, [*gate, "--max-kl", "10"])
    assert passed.exit_code == 0, passed.output
    assert "share=0 with a stand-in" in passed.output
    failed = CliRunner().invoke(app, [*gate, "--max-kl", "1e-12"])
    assert failed.exit_code == 1, failed.output
    assert "none of these shares" in failed.output
    assert failed.output.count("recomputed: KL") == 4
