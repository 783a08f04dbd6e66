"""Forward pass and optimiser for training a ``LlamaForCausalLM`` on packed rows of equal length.

The parameters are those of the transformers model; only the forward is written out, so that the two compiled halves of
a decoder layer see one shape (``[tokens, hidden]``) at every row length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def new_model(
    vocabulary: int = 4096, hidden: int = 256, layers: int = 8, heads: int = 8, kv_heads: int = 4, mlp: int = 768
):
    """A Llama with random weights: head size 64, tied embeddings, rope theta 500000, 65536 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=65536,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float()


def rms_norm(x, weight):
    """RMS norm in float32, back in the type of ``x``."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


def _rotate(x, cos, sin):
    y = x.float()  # [tokens, heads, 64]
    half = y.shape[-1] // 2
    turned = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
    return (y * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def before_attention(x, cos, sin, norm, wq, wk, wv):
    """Queries ``[tokens, heads, 64]`` and keys, values ``[tokens, kv_heads, 64]`` of ``x`` ``[tokens, hidden]``."""
    y = rms_norm(x, norm)
    q = F.linear(y, wq.to(y.dtype)).view(x.shape[0], -1, 64)
    k = F.linear(y, wk.to(y.dtype)).view(x.shape[0], -1, 64)
    v = F.linear(y, wv.to(y.dtype)).view(x.shape[0], -1, 64)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def after_attention(x, attended, wo, norm, gate, up, down):
    """Output projection and MLP with their residuals."""
    x = x + F.linear(attended, wo.to(x.dtype))
    y = rms_norm(x, norm)
    inner = F.silu(F.linear(y, gate.to(y.dtype))) * F.linear(y, up.to(y.dtype))
    return x + F.linear(inner, down.to(y.dtype))


class Forward:
    """Hidden states of a transformers Llama, with compiled layer halves if ``compiled``."""

    def __init__(self, model, compiled: bool) -> None:
        self.model = model
        self.before, self.after = before_attention, after_attention
        if compiled:
            self.before = torch.compile(before_attention, dynamic=False)
            self.after = torch.compile(after_attention, dynamic=False)
        self._rope: dict[tuple[int, int], tuple] = {}

    def rope(self, rows: int, length: int, device):
        """cos, sin ``[rows * length, 64]`` in float32."""
        if (rows, length) not in self._rope:
            self._rope.clear()
            steps = torch.arange(0, 64, 2, device=device, dtype=torch.float64) / 64
            angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * 500000.0**-steps
            angles = torch.cat((angles, angles), dim=-1)
            self._rope[rows, length] = tuple(f(angles).float().repeat(rows, 1) for f in (torch.cos, torch.sin))
        return self._rope[rows, length]

    def __call__(self, ids, dtype=torch.bfloat16):
        """Last hidden states before the final norm, ``[rows * length, hidden]``, of ids ``[rows, length]``."""
        rows, length = ids.shape
        body = self.model.model
        cos, sin = self.rope(rows, length, ids.device)
        x = F.embedding(ids.reshape(-1), body.embed_tokens.weight).to(dtype)
        for layer in body.layers:
            att, mlp = layer.self_attn, layer.mlp
            q, k, v = self.before(
                x, cos, sin, layer.input_layernorm.weight, att.q_proj.weight, att.k_proj.weight, att.v_proj.weight
            )
            groups = q.shape[1] // k.shape[1]
            q, k, v = (t.view(rows, length, -1, 64).transpose(1, 2) for t in (q, k, v))  # [rows, heads, length, 64]
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            attended = attended.transpose(1, 2).reshape(rows * length, -1)
            x = self.after(
                x, attended, att.o_proj.weight, layer.post_attention_layernorm.weight,
                mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
            )  # fmt: skip
        return x

    def logits(self, x):
        """Logits ``[n, vocabulary]`` of hidden states ``[n, hidden]``."""
        body = self.model.model
        return F.linear(rms_norm(x, body.norm.weight), body.embed_tokens.weight.to(x.dtype)).float()


class Muon:
    """Muon (orthogonalised momentum) for the weight matrices, stacked by shape; update RMS matched to AdamW's."""

    def __init__(self, parameters, momentum: float = 0.95) -> None:
        self.groups: dict[tuple[int, int], list] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momentum = momentum
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate ``rate``."""
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum))
            update = update.float() * (-rate * 0.2 * max(shape) ** 0.5)
            torch._foreach_add_(group, list(update.unbind(0)))


def orthogonalise(matrices, steps: int = 5):
    """Newton-Schulz iteration on a stack of matrices ``[n, a, b]`` in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def split_parameters(model):
    """(weight matrices for Muon, embedding and norms for AdamW)."""
    body = model.model
    matrices = [p for name, p in body.layers.named_parameters() if p.ndim == 2]
    seen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in seen]
