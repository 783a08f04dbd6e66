"""A stand-in for flash-attn-4's attention over rows of different lengths."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from attnpatch.decisions import Selection
from attnpatch.executors import naive


class FakeVarlen:
    """Stands in for flash_attn_varlen_func: rows packed left, bottom-right causal, nothing written behind a row."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, *, softmax_scale, causal, seqused_q, seqused_k, return_lse=False, **_):
        assert causal and seqused_q.dtype == seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
        self.calls += 1
        out = torch.full_like(q, float("nan"))
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"))
        for row, (rows, slots) in enumerate(zip(seqused_q.tolist(), seqused_k.tolist(), strict=True)):
            if rows:
                keys, values = (x[row : row + 1, :slots].transpose(1, 2) for x in (k, v))
                part = SimpleNamespace(k=keys, v=values, pos=torch.arange(slots)[None, None], holes=False)
                ctx = SimpleNamespace(scaling=softmax_scale, softcap=None, window=None, mask=None)
                ctx.q_pos = torch.arange(slots - rows, slots)[None]
                query = q[row : row + 1, :rows].transpose(1, 2)
                out[row, :rows], lse[row, :, :rows] = (
                    x[0] for x in naive.run(query, part, Selection(), ctx, want_lse=True)
                )
        return (out, lse) if return_lse else out
