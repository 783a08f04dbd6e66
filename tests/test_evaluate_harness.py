"""lm-evaluation-harness: the class and the command line, with a stand-in where lm_eval is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import evaluation
import pytest
from test_cli import folder, one_error, outcome  # noqa: F401  (folder is a fixture)
from test_evaluate_likelihood import CONTEXT, CONTINUATION, dense_logs

from attnpatch.api import patched, resolve
from attnpatch.errors import ConfigError, UnsupportedModeError, VersionError
from attnpatch.evaluate import harness, likelihood


class StandIn:
    """What the subclass needs of HFLM."""

    max_length = 512

    def __init__(self, pretrained, tokenizer=None, **kwargs):
        self.model, self.tokenizer, self.kwargs = pretrained, tokenizer, kwargs
        self.cache_hook = SimpleNamespace(add_partial=lambda *row: self.noted.append(row))
        self.noted = []

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return ["rolling"] * len(requests)


@pytest.fixture
def stand_in(monkeypatch):
    """A module lm_eval with that class, a registry and a command line that notes what it was given."""
    seen = SimpleNamespace(classes={}, argv=None)
    made = {n: ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.api",
                                       "lm_eval.api.registry", "lm_eval.__main__")}  # fmt: skip
    made["lm_eval.models.huggingface"].HFLM = StandIn
    made["lm_eval.api.registry"].register_model = lambda name: lambda cls: seen.classes.setdefault(name, cls)
    made["lm_eval.__main__"].cli_evaluate = lambda: setattr(seen, "argv", list(sys.argv))
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def requests():
    return [(("c", "a"), CONTEXT, CONTINUATION), (("d", "b"), CONTEXT[:40], [9]), (None, CONTEXT, [8, 7])]


@pytest.mark.parametrize("patch", [None, {"budget": 400, "window_size": 4}], ids=["dense", "full budget"])
def test_log_likelihoods_equal_one_forward(stand_in, patch):
    stock = evaluation.model()
    patches = resolve("snapkv", **patch) if patch else ()
    lm = harness.lm_class(patches)(evaluation.model(), tokenizer=evaluation.tokenizer())
    found = lm._loglikelihood_tokens(requests())
    for (_, context, continuation), (total, greedy) in zip(requests(), found, strict=True):
        assert total == pytest.approx(dense_logs(stock, context, continuation).sum().item(), abs=1e-4)
        assert isinstance(greedy, bool)
    assert [row[1] for row in lm.noted] == [("c", "a"), ("d", "b")]


def test_log_likelihoods_see_eviction(stand_in):
    patches = resolve("snapkv", budget=12, window_size=4)
    lm = harness.lm_class(patches)(evaluation.model(), tokenizer=evaluation.tokenizer())
    stock = evaluation.model()
    for (_, context, continuation), (total, _) in zip(requests(), lm._loglikelihood_tokens(requests()), strict=True):
        assert abs(total - dense_logs(stock, context, continuation).sum().item()) > 1e-3


def test_long_contexts_lose_tokens_from_the_left(stand_in):
    lm = harness.lm_class(())(evaluation.model(), tokenizer=evaluation.tokenizer())
    lm.max_length = 50
    ((total, _),) = lm._loglikelihood_tokens([(None, CONTEXT, CONTINUATION)])
    wanted = dense_logs(evaluation.model(), CONTEXT[-(51 - len(CONTINUATION)) :], CONTINUATION).sum().item()
    assert total == pytest.approx(wanted, abs=1e-4)


def test_rolling_refuses_what_would_evict_nothing(stand_in):
    lm = harness.lm_class(resolve("snapkv"))(evaluation.model(), tokenizer=evaluation.tokenizer())
    with pytest.raises(UnsupportedModeError, match="snapkv would evict nothing; use attnpatch evaluate"):
        lm.loglikelihood_rolling([1])
    lm = harness.lm_class(resolve("flexprefill"))(evaluation.model(), tokenizer=evaluation.tokenizer())
    assert lm.loglikelihood_rolling([1]) == ["rolling"]


def test_methods_that_read_text_get_the_tokenizer(stand_in):
    tokenizer, method = evaluation.tokenizer(), resolve("infiniretri")
    harness.lm_class(method)(evaluation.model(), tokenizer=tokenizer)
    assert method[0].tokenizer is tokenizer


def test_command_hands_over(stand_in, capsys, folder):  # noqa: F811
    before = list(sys.argv)
    argv = (
        "lm-eval",
        "--model",
        folder,
        "--patch",
        "snapkv",
        "--set",
        "budget=64",
        "--tasks",
        "piqa,boolq",
        "--limit",
        "3",
    )
    assert outcome(capsys, *argv, "--model_args", "dtype=float32")[0] == 0
    ours = ["lm-eval", "run", "--model", "attnpatch", "--model_args", f"pretrained={folder}"]
    assert stand_in.argv == [*ours, "--tasks", "piqa,boolq", "--limit", "3", "--model_args", "dtype=float32"]
    assert sys.argv == before and issubclass(stand_in.classes["attnpatch"], StandIn)
    assert outcome(capsys, "lm-eval", "--model", "testbed", "--patch", "dense", "--tasks", "piqa")[0] == 0
    assert stand_in.argv[5].endswith("weights")


def test_refusals(stand_in, capsys, folder):  # noqa: F811
    argv = ("lm-eval", "--model", folder, "--patch", "snapkv", "--tasks", "piqa")
    assert "-M is lm_eval's choice of a model class" in one_error(capsys, *argv, "-M", "hf")
    assert "names the model again" in one_error(capsys, *argv, "--model_args", "dtype=auto,pretrained=x")
    assert "names the model again" in one_error(capsys, *argv, "-a", "dtype=auto", "pretrained=x")
    assert "names the model again" in one_error(capsys, *argv, "--model_args=pretrained=x")
    assert "exactly one of --patch NAME and --recipe" in one_error(capsys, "lm-eval", "--model", folder)
    assert "no model folder" in one_error(capsys, "lm-eval", "--model", "./absent", "--patch", "snapkv")


def test_absent_harness_names_the_extra(monkeypatch, capsys, folder):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(VersionError, match=r"pip install 'attnpatch\[lm-eval\]'"):
        harness.base_class()
    argv = ("lm-eval", "--model", folder, "--patch", "snapkv", "--tasks", "piqa")
    assert "install it: pip install 'attnpatch[lm-eval]'" in one_error(capsys, *argv)
    with pytest.raises(ConfigError, match="names the model again"):
        harness.with_model("m", ["-a", "pretrained=x"])


SEAMS = {
    "between tokens": ([1, 5, 6], [1, 5, 6, 7], ([1, 5, 6], [7])),
    "one token spans it": ([1, 5, 6, 7, 8], [1, 5, 9], ([1, 5], [9])),
    "the context's last token differs": ([1, 5, 6], [1, 5, 7, 8], ([1, 5], [7, 8])),
    "nothing of the context's own": ([5], [9, 8], ([0], [9, 8])),
    "an empty continuation": ([1, 5], [1, 5], ([1], [5])),
}


@pytest.mark.parametrize("which", list(SEAMS))
def test_a_token_over_the_seam_belongs_to_the_continuation(which):
    context, whole, wanted = SEAMS[which]
    assert harness.at_the_seam(context, whole, start=0) == wanted


def test_with_the_real_harness():
    """Requests through lm_eval's own entry points."""
    pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from lm_eval.api.instance import Instance

    tokenizer, model = evaluation.tokenizer(), evaluation.model()
    lm = harness.lm_class(resolve("snapkv", budget=400, window_size=4))(model, tokenizer=tokenizer, batch_size=1)
    context, continuation = evaluation.text(60), " w5 w9"
    (found,) = lm.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)])
    ids = [tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]]
    assert found[0] == pytest.approx(dense_logs(evaluation.model(), *ids).sum().item(), abs=1e-4)
    wanted = {"until": ["<end>"], "max_gen_toks": 4, "do_sample": False}
    (text,) = lm.generate_until([Instance("generate_until", {}, (context, wanted), 0)])
    assert isinstance(text, str)


def test_a_local_task_through_the_real_command(tmp_path, folder):  # noqa: F811
    """A YAML task on a jsonl file, offline: what the harness counts right is what the patched model answers."""
    pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    budget = {"budget": 16, "window_size": 4}
    options, items, dense = [" w5", " w9", " w11", " w2"], [], []
    for seed in range(12):
        text = evaluation.text(60, seed=seed)

        def best(text=text):
            ids = tokenizer(text)["input_ids"]
            rest = [tokenizer(text + option)["input_ids"][len(ids) :] for option in options]
            return max(range(4), key=[float(s.logs.sum()) for s in likelihood.score(model, ids, rest)].__getitem__)

        dense.append(best())
        with patched(model, "snapkv", **budget):
            items.append({"text": text, "choices": options, "gold": best()})
    assert dense != [item["gold"] for item in items]  # else eviction would not show
    data, task = tmp_path / "items.jsonl", tmp_path / "local_choice.yaml"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task.write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = [sys.executable, "-m", "attnpatch.cli.main", "lm-eval", "--model", folder, "--patch", "snapkv"]
    command += [x for key, value in budget.items() for x in ("--set", f"{key}={value}")]
    command += ["--tasks", "local_choice", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--device", "cpu"], env={**os.environ, **offline}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tmp_path.glob("out/**/results_*.json")
    assert json.loads(found.read_text())["results"]["local_choice"]["acc,none"] == 1.0
