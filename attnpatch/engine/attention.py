"""The one attention function and the one mask function registered with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnpatch.engine import turns
from attnpatch.engine.call import KV, Call, Ctx
from attnpatch.engine.layer import PatchLayer
from attnpatch.engine.terms import DENSE, attend, reweigh, with_extra
from attnpatch.errors import InputError, PatchStateError, UnsupportedModeError, UnsupportedModelError
from attnpatch.executors import dense, dispatch

if TYPE_CHECKING:
    from torch import Tensor

    from attnpatch.engine.cache import PatchCache
    from attnpatch.engine.call import Plan
    from attnpatch.patch import Patch

_NEUTRAL = {"position_ids", "use_cache", "cache_position", "output_hidden_states", "return_dict", "is_causal"}


def mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Hand the 2-D padding mask down; each layer builds its own mask from it. Overlays become a 4-D bool mask."""
    if not allow_is_causal_skip and q_length > 1:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask,
            allow_is_causal_skip=False, **kwargs,
        )  # fmt: skip
    return attention_mask


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None,
    sliding_window: int | None = None, attnpatch: Call | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [B, Hq, T, D], key/value [B, Hkv, T or S, D] after RoPE -> (out [B, T, Hq, D], None)."""
    if attnpatch is None:
        raise PatchStateError(
            "the patched attention ran without its forward hook: a compiled graph older than the patch "
            "(run torch.compiler.reset()), a module called on its own (call the model itself), or a family whose "
            "layers hand no keywords on to their attention, which cannot be patched (unpatch_model(model))."
        )
    call, scaling = attnpatch, query.shape[-1] ** -0.5 if scaling is None else scaling
    if call.tap is not None and call.tap.layer == module.layer_idx:
        call.tap.take(query, key, value, scaling, softcap)
    if not call.ready:  # one look per forward: every layer gets the same
        _check_keywords(kwargs)
        call.read_mask(attention_mask)
    if attention_mask is not None and attention_mask.ndim == 4:
        call.take_4d(attention_mask)
    layer = call.cache.layers[module.layer_idx] if call.cache is not None else None
    if isinstance(layer, PatchLayer):
        _check_in_step(layer, call, module.layer_idx, key.shape[0])
        layer.update(key, value)  # a forward without use_cache has not called it
        return _patched(call, layer, module.layer_idx, query, key, value, scaling, softcap), None
    window = call.plan.facts[module.layer_idx].window if sliding_window is None else sliding_window
    return _stock(call, query, key, value, scaling, softcap, window), None


def _check_in_step(layer: PatchLayer, call: Call, index: int, batch: int) -> None:
    if layer.seen == call.after:
        raise UnsupportedModelError(
            f"layer {index} computes attention more than once a forward (differential attention?), which attnpatch "
            "does not know; unpatch_model(model) and use the model as it is."
        )
    if layer.seen != call.before:
        raise PatchStateError(
            f"layer {index} holds {layer.seen} tokens where others hold {call.before}: an earlier forward on this "
            "cache broke off in its midst; start a new PatchCache(model)."
        )
    if layer.seen and layer.packed is None and layer.keys.shape[0] != batch:
        raise InputError(
            f"the cache holds {layer.keys.shape[0]} rows and {batch} were given; "
            "feed as many, or start a new PatchCache(model)."
        )


def _check_keywords(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions=True needs the N x N matrix, which a patched model never builds; "
            "unpatch_model(model) and load with attn_implementation='eager' for that."
        )
    for name, value in kwargs.items():
        if name not in _NEUTRAL and isinstance(value, torch.Tensor):
            raise UnsupportedModelError(
                f"the model passes {name!r} to its attention, which attnpatch does not compute; "
                "unpatch the model, or report the family so that it can be added."
            )


def _stock(
    call: Call, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None, window: int | None
) -> Tensor:
    """Layers that stay as transformers keeps them (sliding window, no cache): dense, pads where they are fed."""
    batch, slots = q.shape[0], k.shape[2]
    offset = call.after - slots  # position of the first returned key, in fed order
    if window is not None and (call.custom is not None or (slots <= window and call.length == 1)):
        window = None  # a 4-D mask says it already; one query sees all of a layer that holds no more than its window
    kv = KV(k, v, None)
    q_pos = None
    if call.padding is not None or window is not None:
        # the window counts fed tokens, as transformers does
        pos = torch.arange(offset, call.after, device=q.device, dtype=torch.int32).expand(batch, 1, -1)
        q_pos = torch.arange(call.before, call.after, device=q.device).expand(batch, -1)
        if call.padding is not None:
            real = call.padding.to(q.device)
            pos = torch.where(real[:, None, offset:], pos, -1)
            q_pos = torch.where(real[:, call.before :], q_pos, -1)
        kv = KV(k, v, pos, holes=call.padding is not None, ordered=True)
    custom = None if call.custom is None else call.custom.to(q.device)[..., -slots:]
    ctx = Ctx(0, 1, call.phase, call.event, q_pos, (), scaling, softcap, window, custom)
    return dispatch.run(q, kv, DENSE, ctx)[0]


def _patched(
    call: Call, layer: PatchLayer, index: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """align, append, attend, reweight, observe, keep, un-align: the order of work inside one attention call."""
    plan, event = call.plan, call.event
    cache: PatchCache = call.cache  # type: ignore[assignment]  # a PatchLayer comes from one
    ordinal = plan.ordinal.get(index)
    idle = (ordinal is None or not plan.acts_on_steps) and layer.packed is None and layer.extra is None
    if event == "step" and idle and softcap is None and call.custom is None:  # nothing to decide: be quick
        kv = layer.append(k, v, call)
        out = dense.single(q, kv.k, kv.v, scaling, call.row_lengths(layer))
        if out is not None:
            return out
        ctx = Ctx(0, 1, call.phase, event, None, (), scaling, softcap)
        if kv.holes:
            kv.pos, ctx.q_pos = layer.pos, call.q_pos(q.shape[0], q.device)
        return dispatch.run(q, kv, DENSE, ctx)[0]
    cache.batch = q.shape[0]
    q_pos: Any = call.q_pos(q.shape[0], q.device) if call.padding is not None else None
    order = call.order(q.device)
    if order is not None:
        q, k, v = (x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v))
    kv = layer.append(k, v, call)
    if layer.count is not None and layer.count.shape[1] == 1 and event != "step":
        kv.real = call.real(layer.count)
    if kv.holes and (kv.packed is None or q.shape[2] > 1):  # one query sees all of packed storage
        kv.pos = layer.pos if kv.packed is None else None
        q_pos = call.q_pos(q.shape[0], q.device) if q_pos is None else q_pos
    keeper = plan.keeper if ordinal is not None and _may_evict(plan, layer, event, cache.turn) else None
    observers = plan.observers[call.phase] if ordinal is not None else ()
    custom = _custom_mask(call, layer, order, q, keeper)
    ctx = Ctx(
        ordinal or 0, len(plan.covered), call.phase, event, q_pos, (), scaling, softcap, None, custom,
        report=layer.report, tally=layer.tally, index=index, shard=plan.shard.fitting(q.shape[1]),
    )  # fmt: skip
    _give_turns(ctx, call, index, q)
    reweighters = plan.reweighters[call.phase] if ordinal is not None else ()
    extra = layer.extra  # what this call finds; `keep` may change it for the next
    want_lse = bool(reweighters) or extra is not None or any(p.needs_lse for p in observers)
    selector = plan.selectors.get(call.phase) if ordinal is not None else None
    if selector is not None or reweighters or observers or keeper is not None:
        _complete(call, layer, kv, ctx, q)
    if selector is None:
        out, lse = dispatch.run(q, kv, DENSE, ctx, want_lse)  # [B, T, Hq, D]
    else:
        out, lse = attend(selector, call, layer, index, q, kv, ctx, want_lse)
    if extra is not None:
        out, lse = with_extra(extra, q, ctx, out, lse)
    if reweighters:
        out = reweigh(reweighters, q, kv, ctx, out, lse)
    if plan.query_tail and event != "step" and ordinal is not None:
        ctx.tail, ctx.tail_pos = _push_tail(layer.tail, q, q_pos, call, plan.query_tail)
        # a copy: a view would keep all queries alive until the next chunk
        layer.tail = (ctx.tail.clone(), ctx.tail_pos) if event == "chunk" else None
    if observers or keeper is not None:
        _decide(call, layer, kv, ctx, q, lse, observers, keeper)
    if order is None:
        return out
    back = order.argsort(dim=-1)[:, :, None, None].expand(-1, -1, out.shape[2], out.shape[3])
    return out.gather(1, back)


def _give_turns(ctx: Ctx, call: Call, index: int, q: Tensor) -> None:
    """What turns this layer's queries to other positions, where the plan has a method that needs it."""
    rope = call.plan.rope
    if rope is not None:
        ctx.turn = lambda x, by: rope.turn(x, index, by)
        ctx.back = lambda x: turns.unturned(call, x, index)
        ctx.pairs = lambda: turns.pairs(call, q, index)


def _may_evict(plan: Plan, layer: PatchLayer, event: str, turn: int) -> bool:
    """A method is asked at its declared events; at a later turn for rows not yet evicted, or if it recompresses."""
    if plan.keeper is None or event not in plan.keeps_at:
        return False
    if event == "step" or plan.keeper.recompresses:
        return True
    open_ = _open(layer, turn)
    return open_ if isinstance(open_, bool) else bool(open_.any())


def _open(layer: PatchLayer, turn: int) -> Any:
    """Whether nothing was evicted at an earlier turn: bool, or bool [B] where rows differ."""
    turns = layer.compressed_turn
    return turns in (-1, turn) if isinstance(turns, int) else (turns == -1) | (turns == turn)


def _untouched(call: Call, layer: PatchLayer, keeper: Patch) -> tuple[bool, ...]:
    """Rows that keep everything: compressed at an earlier turn, or without a token in this chunk; () = none."""
    done = None
    if not keeper.recompresses and not isinstance(layer.compressed_turn, int):
        done = ~_open(layer, call.cache.turn)  # type: ignore[union-attr]
    if call.event == "chunk" and call.padding is not None:
        idle = call.fresh[:, 0] == 0
        done = idle if done is None else done | idle.to(done.device)
    return () if done is None else tuple(done.tolist())


def _custom_mask(call: Call, layer: PatchLayer, order: Any, q: Tensor, keeper: Any) -> Tensor | None:
    if call.custom is None:
        return None
    if not layer.complete or layer.count is not None or order is not None:
        raise UnsupportedModeError(
            "a 4-D attention mask (image blocks, packed sequences) cannot be applied to an evicted or padded cache; "
            "feed the images in the first turn, one prompt at a time."
        )
    if keeper is not None and not bool(call.custom[:, :, -1].all()):
        raise UnsupportedModeError(
            "a 4-D attention mask that hides keys from the last token cannot be combined with eviction; "
            "pass the padding as a 2-D mask."
        )
    return call.custom.to(q.device)


def _push_tail(tail: Any, q: Tensor, q_pos: Tensor | None, call: Call, width: int) -> tuple[Tensor, Tensor]:
    """The last `width` real prompt queries [B, Hq, w, D] and their positions [B, w], across chunks."""
    if q_pos is None and (tail is None or q.shape[2] >= width):
        pos = torch.arange(call.after - min(width, q.shape[2]), call.after, device=q.device)
        return q[:, :, -width:], pos.expand(q.shape[0], -1)
    pos = q_pos if q_pos is not None else call.q_pos(q.shape[0], q.device)
    if tail is not None:
        q, pos = torch.cat([tail[0], q], dim=2), torch.cat([tail[1], pos], dim=1)
    last = pos.argsort(dim=-1, stable=True)[:, -width:]  # padding (-1) first, so it falls off
    return q.gather(2, last[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])), pos.gather(1, last)


def _complete(call: Call, layer: PatchLayer, kv: KV, ctx: Ctx, q: Tensor) -> None:
    """Fill in what hooks may read and the plain dense road does without."""
    if kv.packed is None:
        kv.pos = call.positions(layer)
    ctx.ragged = layer.count is not None
    ctx.q_pos = ctx.q_pos if ctx.q_pos is not None else call.q_pos(q.shape[0], q.device)
    if call.event != "step":
        ctx.prompt_len = call.prompt_len
        ctx.bytes_per_token = float(
            (kv.k.shape[1] * kv.k.shape[3] * kv.k.element_size() + kv.v.shape[1] * kv.v.shape[3] * kv.v.element_size())
            * ctx.shard.size
            * ctx.n_layers
        )


def _decide(
    call: Call, layer: PatchLayer, kv: KV, ctx: Ctx, q: Tensor, lse: Tensor | None, observers: Any, keeper: Any
) -> None:
    """Run the hooks and apply what they decide."""
    cache: PatchCache = call.cache  # type: ignore[assignment]
    ctx.lse, ctx.out = lse, None
    ctx.at = cache.view
    for patch in observers:
        patch.observe(q, kv, ctx)
    if keeper is None:
        return
    if call.event != "step":
        ctx.untouched = _untouched(call, layer, keeper)
    cache.decide(keeper.keep(q, kv, ctx), ctx.layer)
