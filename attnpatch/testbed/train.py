"""Train the testbed model.

First prepare the text with ``python -m attnpatch.testbed.corpus``, then

    python -m attnpatch.testbed.train --corpus DIR --out DIR --seconds 600

The curriculum is driven by time: a stage ends once its needle accuracy is reached, or after its longest time; what is
left goes to the last stage.  The rate falls to a tenth before rows get longer than 4096 tokens: at a higher rate the
match of keys is lost there.  It takes about ten minutes on one H200; on a CPU only ``--tiny`` dry runs are practical.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .data import GROUPS, Corpus, Feed, Stage
from .score import FINAL, QUICK, count_correct, longeval_set, make_set, report

STAGES = [
    Stage("128", ((128, 1.0),), (1, 0, 0), 0.0, 0.0, (1.0, 1.0), (30, 150), 0.97),
    Stage("256", ((256, 0.8), (128, 0.2)), (0.85, 0.15, 0), 0.3, 0.1, (1.0, 0.8), (25, 90), 0.97),
    Stage("1024", ((1024, 0.8), (256, 0.2)), (0.6, 0.25, 0.15), 0.5, 0.15, (0.8, 0.5), (50, 110), 0.97),
    Stage("4096", ((4096, 0.7), (1024, 0.3)), (0.5, 0.25, 0.25), 0.5, 0.15, (0.5, 0.1), (90, 150), 0.99),
    Stage("8192", ((8192, 0.5), (4096, 0.2), (1024, 0.3)), (0.5, 0.25, 0.25), 0.5, 0.15, (0.1, 0.1), (60, 110), 0.99),
    Stage(
        "16384", ((16384, 0.5), (8192, 0.1), (4096, 0.15), (1024, 0.2), (32768, 0.05)), (0.5, 0.25, 0.25), 0.5, 0.15,
        (0.1, 0.005), (1e9, 1e9),
    ),
]  # fmt: skip
WARMUP_STEPS = 60


@dataclass
class Progress:
    """Where the run stands; saved with each checkpoint."""

    stage: int = 0
    stage_seconds: float = 0.0
    step: int = 0
    best: float = -1.0
    passed: int = 0  # reports in a row that reached the stage's target
    history: list[dict] = field(default_factory=list)


class Trainer:
    """Model, optimisers and the loop over stages."""

    def __init__(self, args, corpus: Corpus, feed: Feed, stages: list[Stage], quick, model=None, forward=None) -> None:
        """Train the testbed model, or ``model`` with its ``forward``."""
        import torch

        from .model import Forward, Muon, new_model, split_parameters

        self.args, self.corpus, self.feed, self.stages, self.quick = args, corpus, feed, stages, quick
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        torch.manual_seed(args.seed)
        if model is None:
            sizes = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 128} if args.tiny else {}
            model = new_model(**sizes)
        self.model = model.to(self.device)
        self.plain = forward or Forward(self.model, compiled=False)
        self.forward = forward or Forward(self.model, compiled=self.device == "cuda")
        matrices, others = split_parameters(self.model)
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.progress = Progress()
        self.started = time.monotonic()
        self.meters: dict[int, object] = {}

    def rate(self) -> float:
        """Learning rate as a share of the peak."""
        stage = self.stages[self.progress.stage]
        longest = stage.seconds[1]
        if longest > 1e8:  # the last stage takes what is left
            spent = time.monotonic() - self.started
            longest = max(1.0, self.args.seconds - spent + self.progress.stage_seconds)
        share = min(1.0, self.progress.stage_seconds / longest)
        value = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * share
        return value * min(1.0, (self.progress.step + 1) / WARMUP_STEPS)

    def step(self) -> int:
        """One optimiser step; returns the row length."""
        import torch
        import torch.nn.functional as F

        length, ids, positions, weights, groups = self.feed.get()
        ids = torch.from_numpy(ids.astype("int64")).to(self.device, non_blocking=True)
        positions = torch.from_numpy(positions.astype("int64")).to(self.device, non_blocking=True)
        weights = torch.from_numpy(weights.astype("float32")).to(self.device, non_blocking=True)
        groups = torch.from_numpy(groups.astype("int64")).to(self.device, non_blocking=True)
        targets = ids.reshape(-1)[positions + 1]
        logits = self.forward.logits(self.forward(ids, self.dtype)[positions])
        losses = F.cross_entropy(logits, targets, reduction="none")
        text = (groups == 0).float()
        answers = weights * (1 - text)
        loss = (losses * answers).sum() / answers.sum() + 0.2 * (losses * text).sum() / text.sum()
        loss.backward()
        rate = self.rate()
        self.muon.step(self.args.muon_rate * rate)
        for group in self.adam.param_groups:
            group["lr"] = self.args.adam_rate * rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():  # meters: [groups, (count, correct, loss)]
            values = torch.stack((torch.ones_like(losses), (logits.argmax(-1) == targets).float(), losses), dim=1)
            meter: Any = self.meters.setdefault(length, torch.zeros(len(GROUPS), 3, device=self.device))
            meter.index_add_(0, groups, values)
        self.progress.step += 1
        return length

    def report_progress(self, waited: float) -> None:
        """Log the meters since the last report and count reports that reached the stage's target."""
        stage = self.stages[self.progress.stage]
        parts = []
        reached = False
        for length, meter in sorted(self.meters.items()):
            table = meter.tolist()  # type: ignore[attr-defined]
            for name in ("needle-first", "vt-first", "vt", "lines-first"):
                count, correct, loss = table[GROUPS.index(name)]
                if count:
                    parts.append(f"{length}:{name} {correct / count:.3f}/{loss / count:.2f}")
                if count and name == "needle-first" and length == stage.lengths[0][0]:
                    reached = correct / count >= stage.target
        self.progress.passed = self.progress.passed + 1 if reached else 0
        now = time.monotonic() - self.started
        print(
            f"{now:5.0f}s stage {stage.name} {self.progress.stage_seconds:4.0f}s step {self.progress.step} "
            f"rate {self.rate():.3f} wait {waited:.2f} | " + " ".join(parts),
            flush=True,
        )
        self.meters.clear()

    def stage_over(self) -> bool:
        """Whether the stage may end: target reached, or its longest time over and the loss is down."""
        stage, seconds = self.stages[self.progress.stage], self.progress.stage_seconds
        if self.progress.passed >= 2 and seconds >= stage.seconds[0]:
            return True
        patience = 1.0 if self.progress.passed else 1.4
        return seconds >= stage.seconds[1] * patience

    def validate(self) -> None:
        """Accuracy on the quick sets; keeps the best weights."""
        scores = [count_correct(self.plain, cases, self.device, self.dtype) / len(cases) for _, cases in self.quick()]
        score = sum(scores) / len(scores)
        text = " ".join(f"{s[0]}-{s[1]}x{s[2]}={v:.2f}" for (s, _), v in zip(self.quick(), scores, strict=True))
        print(f"  validation {score:.4f} | {text}", flush=True)
        self.progress.history.append({"step": self.progress.step, "score": score, "scores": scores})
        if score >= self.progress.best:
            self.progress.best = score
            self.save("best.pt", whole=False)

    def save(self, name: str, whole: bool = True) -> None:
        """Write a checkpoint (``whole``: with the optimisers' state)."""
        import torch

        state = {"model": self.model.state_dict(), "progress": vars(self.progress)}
        if whole:
            state |= {"muon": list(self.muon.buffers.values()), "adam": self.adam.state_dict()}
        self.args.out.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.args.out / "new.pt")
        (self.args.out / "new.pt").replace(self.args.out / name)

    def load(self, file: Path) -> None:
        """Continue from a checkpoint."""
        import torch

        state = torch.load(file, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.progress = Progress(**state["progress"])
        if "muon" in state:
            for buffer, saved in zip(self.muon.buffers.values(), state["muon"], strict=True):
                buffer.copy_(saved)
            self.adam.load_state_dict(state["adam"])
        print("resumed", file, "stage", self.stages[self.progress.stage].name, flush=True)

    def run(self) -> None:
        """Train until ``args.seconds`` after the start."""
        if self.device == "cuda":
            self.warm_up()
        now = logged = validated = saved = time.monotonic()
        waited, every = 0.0, self.args.log_every
        while now - self.started < self.args.seconds:
            queue_empty = self.feed.queue.empty()
            self.step()
            before, now = now, time.monotonic()
            waited += (now - before) if queue_empty else 0.0
            self.progress.stage_seconds += now - before
            if now - logged >= every:
                self.report_progress(waited / (now - logged))
                logged, waited = time.monotonic(), 0.0
                if self.stage_over():
                    self.save(f"stage{self.progress.stage}.pt")
                    self.progress.stage += 1
                    self.progress.stage_seconds, self.progress.passed = 0.0, 0
                    self.feed.current.value = self.progress.stage
            longest = max(length for length, _ in self.stages[self.progress.stage].lengths)
            if longest >= 4096 and now - validated >= 5 * every:
                self.validate()
                validated = now = time.monotonic()
            if now - saved >= 8 * every:
                self.save("last.pt")
                saved = now = time.monotonic()
        self.validate()
        self.save("last.pt")

    def warm_up(self) -> None:
        """Compile on one batch; fall back to the plain forward if the compiler fails."""
        begun = time.monotonic()
        try:
            length = self.step()
            print(f"compiled in {time.monotonic() - begun:.0f} s (rows of {length})", flush=True)
        except Exception as error:  # the compiler may raise anything
            print("compiling failed, continuing without:", repr(error)[:500], flush=True)
            self.model.zero_grad(set_to_none=True)
            self.forward = self.plain
        self.meters.clear()


def export(trainer: Trainer, folder: Path, shard: str) -> None:
    """Write the weights in bfloat16 with config, generation config and tokenizer."""
    import torch

    state = torch.load(trainer.args.out / "best.pt", map_location=trainer.device, weights_only=False)
    trainer.model.load_state_dict(state["model"])
    trainer.model.to(torch.bfloat16)
    trainer.model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trainer.args.corpus / name, folder / name)
    trainer.model.float()


def final_report(trainer: Trainer, sets, longeval) -> dict:
    """Figures of the exported weights (rounded to bfloat16) on fresh cases."""
    rows = report(trainer.plain, sets, trainer.device, trainer.dtype)
    for name, cases in longeval:
        spec = (f"longeval/{name}", 0, 1, len(cases), "file")
        rows += report(trainer.plain, [(spec, cases)], trainer.device, trainer.dtype)
    return {"rows": rows, "step": trainer.progress.step, "history": trainer.progress.history}


def _cap(stages: list[Stage], cap: int, scale: float) -> list[Stage]:
    """The curriculum of a dry run: rows of at most ``cap`` tokens, times scaled."""
    return [
        replace(
            stage,
            lengths=tuple((min(length, cap), share) for length, share in stage.lengths),
            seconds=tuple(s if s > 1e8 else s * scale for s in stage.seconds),  # type: ignore[arg-type]
        )
        for stage in stages
    ]


def _arguments(argv: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by attnpatch.testbed.corpus")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints")
    parser.add_argument("--export", type=Path, help="folder for the trained model (default: OUT/weights)")
    parser.add_argument("--longeval", type=Path, help="folder with LongEval's lines_*.jsonl.gz, as a check")
    parser.add_argument("--seconds", type=float, default=600, help="training time, without the final evaluation")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens a step")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--log-every", type=float, default=5.0, help="seconds")
    parser.add_argument("--muon-rate", type=float, default=3e-3, help="peak rate of the weight matrices")
    parser.add_argument("--adam-rate", type=float, default=8e-3, help="peak rate of embedding and norms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="checkpoint to continue from")
    parser.add_argument("--stage", type=int, help="with --resume: continue in this stage")
    parser.add_argument("--shard", default="12MB", help="largest file of the exported weights")
    parser.add_argument("--tiny", action="store_true", help="dry run on a CPU: tiny model, rows up to 1024 tokens")
    return parser.parse_args(argv)


def _evaluation(args, corpus: Corpus, held_out: Corpus, pool):
    """Cases of the quick and the final evaluation, made by other processes in the background."""
    longest = 1024 if args.tiny else 10**9
    quick = [spec for spec in QUICK if spec[1] <= longest]
    final = [spec if not args.tiny else (*spec[:3], 4, spec[4]) for spec in FINAL if spec[1] <= longest]
    quick_jobs = [(spec, pool.apply_async(make_set, (held_out, spec, 10**6))) for spec in quick]
    final_jobs = [(spec, pool.apply_async(make_set, (held_out, spec, 2 * 10**6))) for spec in final]
    files = sorted(args.longeval.glob("lines_*.jsonl.gz")) if args.longeval else []
    longeval = [(file.name.split(".")[0], longeval_set([file], corpus.encoder)) for file in files]
    return quick_jobs, final_jobs, longeval


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and export."""
    args = _arguments(argv)
    stages = _cap(STAGES, 1024, 0.05) if args.tiny else STAGES
    corpus, held_out = Corpus(args.corpus), Corpus(args.corpus, "held_out")
    start = args.stage or 0
    if args.resume and args.stage is None:
        import torch

        start = torch.load(args.resume, map_location="cpu", weights_only=False)["progress"]["stage"]
    feed = Feed(corpus, stages, args.tokens, args.workers, args.seed + 104729 * start, start)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        quick_jobs, final_jobs, longeval = _evaluation(args, corpus, held_out, pool)
        trainer = Trainer(args, corpus, feed, stages, lambda: [(spec, job.get()) for spec, job in quick_jobs])
        if args.resume:
            trainer.load(args.resume)
        trainer.progress.stage = start
        trainer.run()
        feed.stop()
        folder = args.export or args.out / "weights"
        export(trainer, folder, args.shard)
        figures = final_report(trainer, ((spec, job.get()) for spec, job in final_jobs), longeval)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("done", flush=True)


if __name__ == "__main__":
    main()
