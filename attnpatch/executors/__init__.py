"""Executors: how a selection of (query, key) pairs becomes attention output.

Every executor is a module with `run(q, kv, selection, ctx, want_lse=False) -> (out, lse)`:

q:    [B, Hq, T, D], model dtype.
kv:   `k`, `v` [B, Hkv, S, D]; `pos` int32 [B, 1|Hkv, S] (-1 = empty slot); `holes`. Without holes every slot is
      visible except for causality, and the last T slots are the T queries in order. Optional promises:
      `ordered` (positions ascend over the slots; default: only if S == T) lets a window slice the keys,
      `clean` (empty slots hold zeros, not garbage; default False) saves zeroing them, `aligned` (slots are positions;
      default False) saves `reweight` the search.
ctx:  `scaling`, `softcap`, `window`, `q_pos` int [B, T] (-1 = padding query), `mask` (None or bool [B, 1, T, S], which
      replaces causality).
out:  [B, T, Hq, D] in q's dtype; lse: [B, Hq, T] fp32 (fp64 for fp64 inputs), natural, over scaled soft-capped logits;
      -inf (and a zero output) for a row without visible keys.

With `selection.rows`, `pages` computes those rows only: out [B, rows, Hq, D], lse [B, Hq, rows]. `naive` returns all T
rows, zeros (lse -inf) where the selection does not reach; `dense` does not read the selection.
`reweight` changes the weights of a few columns afterwards, from (out, lse).
`backends` names the backends of all executors and picks among one's own by capability; `lists` makes page lists.

This package imports neither flash_attn nor triton at import time.
"""
