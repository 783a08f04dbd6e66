"""Budget, KeepSet, the base of every patch, and the noise that random choices use."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attnpatch import patch as registry
from attnpatch.budget import Budget
from attnpatch.decisions import KeepSet
from attnpatch.engine.call import Ctx
from attnpatch.errors import ConfigError, InputError

# ---- Budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind", "value"),
    [
        (1, "tokens", 1),
        (1024, "tokens", 1024),
        ("1024", "tokens", 1024),
        (2.0, "tokens", 2),
        ("2e3", "tokens", 2000),
        (1.0, "ratio", 1.0),
        ("1.0", "ratio", 1.0),
        (0.25, "ratio", 0.25),
        (".25", "ratio", 0.25),
        ("2.5e-1", "ratio", 0.25),
        ("512MiB", "bytes", 512 * 2**20),
        (" 1.5 gb ", "bytes", 1.5e9),
        ("7b", "bytes", 7),
        ("1kB", "bytes", 1000),
    ],
)
def test_budget_forms(spec, kind, value):
    budget = Budget.parse(spec)
    assert (budget.kind, budget.value) == (kind, value)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "spec",
    [
        1024, 0.25, 0.3333, "512MiB", "1GiB",
        1.0,
        "1GB",
        "7b",
        1 / 3,
    ],
)  # fmt: skip
def test_budget_text_reads_back(spec):
    budget = Budget.parse(spec)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "spec",
    [0, -1, 0.0, -0.5, 1.5, "0", "1.5", "-3", "", "many", "nan", "inf", "0MiB", "-1MiB", "1TiB", "1 000", True, None,
     float("nan"), [3], b"3",
     float("inf")],
)  # fmt: skip
def test_budget_refuses(spec):
    with pytest.raises(ConfigError, match="tokens \\(1024\\)"):
        Budget.parse(spec)


@pytest.mark.parametrize(
    ("spec", "length", "expected"),
    [(5, 3, 5), (0.5, 7, 4), (0.1, 30, 3), (0.1, 31, 4), (0.7, 10, 7), (0.01, 1, 1), (1.0, 13, 13), (0.5, 0, 1)],
)
def test_budget_tokens(spec, length, expected):
    assert Budget.parse(spec).tokens(length) == expected


def test_budget_in_bytes_needs_the_size_of_a_token():
    budget = Budget.parse("1KiB")
    assert [budget.tokens(10, x) for x in (1024.0, 1025.0, 100.0)] == [1, 1, 10]
    with pytest.raises(ConfigError, match="bytes per token"):
        budget.tokens(10)


def test_budget_text():
    assert [str(Budget.parse(x)) for x in (0.25, 1024, "512MiB")] == ["0.25", "1024", "512MiB"]


# ---- KeepSet -----------------------------------------------------------------------------------------------------


def slots(n: int, batch: int = 1, heads: int = 1) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32).expand(batch, heads, n)


def chosen(keep: KeepSet) -> list[list[list[int]]]:
    """Slots that stay, per row and head."""
    rows = []
    for b in range(keep.index.shape[0]):
        count = None if keep.count is None else keep.count[b]
        rows.append([i[: None if count is None else int(count[h])].tolist() for h, i in enumerate(keep.index[b])])
    return rows


def test_top_takes_the_best_in_order_and_ties_go_to_the_later():
    scores = torch.tensor([[[1.0, 5, 3, 5, 0, 3], [0.0, 0, 0, 0, 0, 0]]])
    keep = KeepSet.top(scores, [3], slots(6))
    assert chosen(keep) == [[[1, 3, 5], [3, 4, 5]]] and keep.count is None
    keep.validate(1, 2, 6)


def test_top_pins_head_and_tail_even_at_the_lowest_score():
    scores = torch.tensor([[[-9.0, 1, 4, 3, 2, -9]]])
    assert chosen(KeepSet.top(scores, [3], slots(6), tail=1, head=1)) == [[[0, 2, 5]]]
    assert chosen(KeepSet.top(scores, [2], slots(6), tail=4)) == [[[4, 5]]]  # room below the tail: the newest
    assert chosen(KeepSet.top(scores, [99], slots(6))) == [[[0, 1, 2, 3, 4, 5]]]


def test_top_with_minus_infinity_and_nothing_pinned_prefers_real_slots():
    pos = torch.tensor([[[0, -1, 1, -1]]])
    keep = KeepSet.top(torch.tensor([[[float("-inf"), 7, 1, 7]]]), [3], pos)
    assert keep.count.tolist() == [[2]] and set(keep.index[0, 0, :2].tolist()) == {0, 2}


def test_top_rows_of_different_room():
    pos = torch.tensor([[[0, 1, 2, 3, 4]], [[0, 1, -1, -1, -1]], [[0, 1, 2, 3, -1]]])
    scores = torch.tensor([5.0, 4, 3, 2, 9]).expand(3, 2, 5)
    keep = KeepSet.top(scores, [4, 4, 2], pos, tail=[1, 1, 2])
    assert chosen(keep) == [[[0, 1, 2, 4]] * 2, [[0, 1]] * 2, [[2, 3]] * 2]
    assert keep.count.tolist() == [[4, 4], [2, 2], [2, 2]]
    for b in range(3):  # the filling is no repeat of what is meant
        assert len(set(keep.index[b, 0].tolist())) == 4
    keep.validate(3, 2, 5)


def test_top_reads_positions_not_slots():
    pos = torch.tensor([[[4, 0, 3, 1, 2]]])
    scores = torch.tensor([[[0.0, 0, 0, 9, 0]]])
    assert chosen(KeepSet.top(scores, [3], pos, tail=1, head=1)) == [[[0, 1, 3]]]


def test_drop_worst():
    scores = torch.tensor([[[3.0, 1, 2, float("inf")], [1.0, 1, 1, 1]]])
    assert KeepSet.drop_worst(scores, slots(4), torch.tensor([3])).drop.tolist() == [[[1], [0]]]
    pos = torch.tensor([[[3, 2, 1, 0]]])  # ties drop the older token, wherever it lies
    assert KeepSet.drop_worst(torch.zeros(1, 1, 4), pos, torch.tensor([3])).drop.tolist() == [[[3]]]


def test_drop_worst_takes_nothing_where_the_row_has_room():
    pos = torch.tensor([[[0, 1, 2, 3]], [[0, 1, -1, 2]], [[0, -1, 1, 2]]])
    scores = torch.tensor([[0.0, 9, 9, 9], [0, 9, -5, 9], [7, -5, 6, 9]])[:, None]
    drop = KeepSet.drop_worst(scores, pos, torch.tensor([3, 3, 2])).drop
    assert drop.flatten().tolist() == [0, -1, 2]  # worst, none, worst (its limit is 2; a free slot is never the worst)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (KeepSet(), "exactly one"),
        (KeepSet(index=torch.zeros(2, 2, 1).long(), drop=torch.zeros(2, 2, 1).long()), "exactly one"),
        (KeepSet(index=torch.zeros(2, 1).long()), "shape"),
        (KeepSet(index=torch.zeros(1, 2, 1).long()), "shape"),
        (KeepSet(index=torch.zeros(2, 3, 1).long()), "shape"),
        (KeepSet(index=torch.full((2, 2, 1), 5)), "outside"),
        (KeepSet(drop=torch.full((2, 2, 1), -2)), "outside"),
        (KeepSet(drop=torch.zeros(2, 2, 2).long()), "one slot"),
        (KeepSet(index=torch.tensor([1, 0]).expand(2, 2, 2)), "ascend"),
        (KeepSet(index=torch.tensor([1, 1]).expand(2, 1, 2)), "ascend"),
    ],
)
def test_validate_refuses(keep, words):
    with pytest.raises(InputError, match=words):
        keep.validate(2, 2, 5)


def test_validate_accepts():
    KeepSet(index=torch.tensor([0, 4]).expand(2, 1, 2)).validate(2, 2, 5)
    KeepSet(index=torch.zeros(2, 2, 0).long()).validate(2, 2, 5)
    KeepSet(drop=torch.tensor([4]).expand(2, 2, 1)).validate(2, 2, 5)


# ---- Patch -------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    registry.list_patches()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @registry.register("toy")
    @dataclasses.dataclass
    class Toy(registry.EvictPatch):
        size: int = registry.option(3, "a size", low=1)
        share: float = registry.option(0.5, "a share", low=0)
        limit: int | None = registry.option(None, "a limit", low=2)
        mode: str = registry.option("a", "a mode", choices=("a", "b"))

        def keep(self, q, kv, ctx):
            return None

    return Toy


def test_toy_is_known_and_described(toy):
    assert toy.name == "toy" and registry.get_patch("toy") is toy and "toy" in registry.list_patches()
    assert toy.hooks() == {"keep"}
    assert [x[:3] for x in registry.describe(toy)][-4:] == [
        ("size", "int", 3), ("share", "float", 0.5), ("limit", "int | None", None), ("mode", "str", "a"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="Did you mean 'toy'"):
        registry.get_patch("toi")


def test_toy_capabilities(toy):
    plain = toy(budget="0.5")
    assert plain.evict_at == {"prompt"} and not plain.recompresses and not plain.needs_lse and plain.query_tail == 0
    assert plain.hyperparameters() == {
        "budget": "0.5", "evict_per_chunk": False, "recompress": False, "size": 3, "share": 0.5, "limit": None,
        "mode": "a",
    }  # fmt: skip
    assert toy(evict_per_chunk=True).evict_at == {"prompt", "chunk"} and toy(recompress=True).recompresses


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "at least 1"),
        ({"size": "3"}, "wrong type"),
        ({"size": True}, "wrong type"),
        ({"share": "x"}, "wrong type"),
        ({"share": float("nan")}, "share=nan is too small"),
        ({"limit": 1}, "at least 2"),
        ({"mode": "c"}, "'a', 'b'"),
        ({"recompress": 1}, "wrong type"),
        ({"budget": None}, "not a budget"),
        ({"sise": 2}, "allowed: budget"),
    ],
)
def test_toy_refuses(toy, values, words):
    with pytest.raises(ConfigError, match=words):
        registry.build(toy, values)


def test_toy_accepts_an_int_for_a_float_and_none_for_an_optional(toy):
    assert registry.build(toy, {"share": 1, "limit": 2}).share == 1


def test_compose(toy):
    other = registry.get_patch("h2o")()
    assert registry.compose([toy()])[0].name == "toy"
    for patches, words in (([], "no patch"), ([toy(), toy()], "twice"), ([toy(), other], "both decide")):
        with pytest.raises(ConfigError, match=words):
            registry.compose(patches)


# ---- noise -------------------------------------------------------------------------------------------------------


def noise(pos: torch.Tensor, layer: int = 0, seed: int = 0) -> torch.Tensor:
    return Ctx(layer, 4, "prefill", "prompt", pos[:, 0], (1,), 1.0).noise(pos, seed)


def test_noise_depends_on_seed_layer_head_and_position_only():
    pos = slots(4000, 1, 4)
    base = noise(pos)
    assert torch.equal(base, noise(pos))
    assert torch.equal(noise(pos.flip(-1)).flip(-1), base)
    assert torch.equal(noise(pos.expand(3, -1, -1))[2], base[0]) and torch.equal(noise(pos[..., 7:90]), base[..., 7:90])
    streams = [noise(pos, layer, seed)[0, h] for layer in (0, 1) for seed in (0, 1) for h in range(4)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 0.08


def test_noise_takes_any_seed():
    pos = slots(50)
    streams = [noise(pos, seed=seed) for seed in (3, 20240607, 2**40, 2**64 + 3)]
    assert all(((x >= 0) & (x < 1)).all() for x in streams)
    assert not any(torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])


def test_noise_is_roughly_uniform():
    x = noise(slots(100_000))
    assert 0 <= x.min() and x.max() < 1
    share = torch.histc(x, 20, 0, 1) / x.numel()
    assert (share - 0.05).abs().max() < 0.004
    assert torch.corrcoef(torch.stack([x[0, 0, 1:], x[0, 0, :-1]]))[0, 1].abs() < 0.02
