"""The decoder of src/model/decoder.cpp in plain PyTorch: pre-norm RMSNorm, half-split RoPE, grouped
queries, SwiGLU, a head of its own. q, k and v are one product, gate and up are another, as in Entrain.
"""
import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-5
ROPE_THETA = 10000.0


def linear(inputs, outputs, std=0.02):
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def rope_tables(tokens, head_dim):
    """cos and sin [tokens, 1, head_dim / 2], float32."""
    half = torch.arange(head_dim // 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(tokens), ROPE_THETA ** (-2 * half / head_dim))
    return angles.cos().float()[:, None], angles.sin().float()[:, None]


def rope(x, cos, sin):
    """Turns the pairs (j, j + head_dim / 2) of x [B, N, H, head_dim]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        d, heads = shape.d_model, shape.n_head + 2 * shape.n_kv_head
        out_std = 0.02 / (2 * shape.n_layer) ** 0.5  # as in GPT-2: what writes to the residual
        self.n_head, self.n_kv_head, self.head_dim = shape.n_head, shape.n_kv_head, shape.head_dim
        self.attention_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.qkv = linear(d, heads * shape.head_dim)
        self.o = linear(shape.n_head * shape.head_dim, d, out_std)
        self.mlp_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.gate_up = linear(d, 2 * shape.d_ff)
        self.down = linear(shape.d_ff, d, out_std)

    def forward(self, x, cos, sin):
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        q, k = rope(qk, cos, sin).split((self.n_head, self.n_kv_head), dim=2)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           is_causal=True, enable_gqa=True)
        x = x + self.o(o.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """shape has the fields of `entrain bench train`: n_layer, d_model, n_head, n_kv_head, head_dim,
    d_ff, vocab, tokens. residual: the type in which layers add to each other."""

    def __init__(self, shape, residual):
        super().__init__()
        self.residual = residual
        self.embed = nn.Embedding(shape.vocab, shape.d_model)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.norm = nn.RMSNorm(shape.d_model, eps=NORM_EPS)
        self.head = linear(shape.d_model, shape.vocab)
        cos, sin = rope_tables(shape.tokens, shape.head_dim)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens, targets):
        """The mean loss, in float32."""
        x = self.embed(tokens).to(self.residual)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
