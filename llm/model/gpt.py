"""GPT: a decoder-only transformer, from token ids to logits, with a key-value cache for generation.

With learned positions, layernorm, gelu and biases it is GPT-2 (Radford et al. 2019). Other options give the modern
block: rotary positions (Su et al. 2021), RMSNorm (Zhang and Sennrich 2019), SwiGLU or GeGLU (Shazeer 2020) or squared
ReLU (So et al. 2021), grouped-query attention (Ainslie et al. 2023), QK-norm (Henry et al. 2020). Options that only
open weights use are None where they are off (see `GPTConfig`).

Shapes: B batch, T tokens of this call, S tokens attended to (cached ones included), C emb_dim, H n_heads, K n_kv_heads,
D head_dim, F ffn_dim, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.config import GPTConfig, LayerKind
from llm.model.cpu_attention import causal_attention
from llm.model.kv_cache import KVCache
from llm.model.linear import Linear, linears
from llm.model.rotary import apply_rotary_emb, rotary_cos_sin

# From queries [B, H, T, D], keys and values [B, K, S, D] and a mask [1 or B, 1, T, S], or None for the causal one, to
# the attention output [B, T, H * D].
PromptKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class RMSNorm(nn.RMSNorm):
    """RMSNorm with its weight in the input's dtype, also under autocast: PyTorch's fused kernel needs that.

    With `unit_offset` it multiplies with 1 + weight, as Gemma does, in fp32.
    """

    def __init__(self, size: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__(size, eps=eps)
        self.unit_offset = unit_offset
        if unit_offset:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self.unit_offset:
            return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, config.norm_eps, bool(config.unit_offset_norm))
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.dropout = 0.0
        self.prompt_kernel: PromptKernel | None = None  # for more than one token without gradients
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.emb_dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.emb_dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.emb_dim, kv_dim, bias=config.qkv_bias)
        self.out_proj = Linear(config.n_heads * config.head_dim, config.emb_dim, bias=config.bias)
        if config.qk_norm:
            q_size, k_size = (H if config.joint_qk_norm else 1 for H in (config.n_heads, config.n_kv_heads))
            self.q_norm = RMSNorm(q_size * config.head_dim, config.norm_eps, bool(config.unit_offset_norm))
            self.k_norm = RMSNorm(k_size * config.head_dim, config.norm_eps, bool(config.unit_offset_norm))

    def qkv(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, T, D], keys and values [B, K, T, D] of the normed residual stream [B, T, C]."""
        B, T, _ = x.shape
        q, k, v = linears(x, self.q_proj, self.k_proj, self.v_proj)  # [B, T, H * D], 2 x [B, T, K * D]
        if self.config.joint_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(B, T, -1, self.config.head_dim) for part in (q, k, v))  # [B, T, H or K, D]
        if self.config.qk_norm and not self.config.joint_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or K, T, D]
        if cos_sin is not None:
            q, k = apply_rotary_emb(q, *cos_sin), apply_rotary_emb(k, *cos_sin)
        if self.config.attention_scale is not None:  # in place of 1 / sqrt(D), with which all kernels multiply
            q = q * (self.config.attention_scale * math.sqrt(self.config.head_dim))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """Return the attention output [B, T, H * D]; keys and values go to the cache, and are read from it."""
        B, _, T, _ = q.shape
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, K, S, D]
        if self.prompt_kernel is not None and T > 1 and not torch.is_grad_enabled():
            return self.prompt_kernel(q, k, v, mask)
        causal, dropout = mask is None and T > 1, self.dropout if self.training else 0.0
        if causal and not dropout and q.device.type == "cpu" and q.dtype == torch.bfloat16:
            y = causal_attention(q, k, v)  # [B, H, T, D]
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
            )  # [B, H, T, D]
        return y.transpose(1, 2).reshape(B, T, -1)


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        bias = config.bias if config.ffn_bias is None else config.ffn_bias
        self.up_proj = Linear(config.emb_dim, config.ffn_dim, bias=bias)
        if config.activation in ("swiglu", "geglu"):
            self.gate_proj = Linear(config.emb_dim, config.ffn_dim, bias=bias)
        self.down_proj = Linear(config.ffn_dim, config.emb_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation in ("swiglu", "geglu"):
            gate, up = linears(x, self.gate_proj, self.up_proj)  # 2 x [B, T, F]
            x = (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
        elif self.activation == "relu2":
            x = F.relu(self.up_proj(x)).square()  # [B, T, F]
        else:
            x = F.gelu(self.up_proj(x), approximate="tanh")  # [B, T, F]
        return self.down_proj(x)  # [B, T, C]


class TransformerBlock(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_place != "after", config.norm_place is not None
        self.norm1 = make_norm(config, config.emb_dim) if before else nn.Identity()
        self.attn = CausalSelfAttention(config, layer)
        self.post_norm1 = make_norm(config, config.emb_dim) if after else nn.Identity()
        self.norm2 = make_norm(config, config.emb_dim) if before else nn.Identity()
        self.ffn = FeedForward(config)
        self.post_norm2 = make_norm(config, config.emb_dim) if after else nn.Identity()
        self.drop = nn.Dropout(0.0)

    def project_qkv(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of the residual stream [B, T, C]."""
        return self.attn.qkv(self.norm1(x), cos_sin)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the block's output [B, T, C] from its input [B, T, C] and the attention output [B, T, H * D]."""
        x = x + self.drop(self.post_norm1(self.attn.out_proj(y)))
        return x + self.drop(self.post_norm2(self.ffn(self.norm2(x))))

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        return self.finish(x, self.attn.attend(*self.project_qkv(x, cos_sin), mask, cache))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # in training, blocks store their inputs and recompute the rest
        self.int8_cache = False  # its KV caches are in 8 bits
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        if config.positions == "learned":
            self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        kinds = [config.layer_kind(layer) for layer in range(config.n_layers)]
        self.kinds = list(dict.fromkeys(kinds))
        self.kind_of_layer = [self.kinds.index(kind) for kind in kinds]
        self.final_norm = make_norm(config, config.emb_dim)
        self.lm_head = Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.tok_emb.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # each block adds twice to the residual stream (GPT-2)
            if name.endswith(("out_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers))

    @property
    def gpt(self) -> GPT:
        """Return the model itself: `model.gpt` is the GPT of a classifier, a compiled decoder or a GPT."""
        return self

    def set_dropout(self, p: float) -> None:
        """Set the dropout of the embeddings, the attention and both branches of each block; a new model has none."""
        self.drop.p = p
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.drop.p = block.attn.dropout = p

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden_states(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        pad: Tensor | None = None,
        cached_hidden: Tensor | None = None,
        start_layer: int = 0,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states [B, T, C] after the final norm, of token ids [B, T].

        With a cache, the ids continue its tokens. `pad` [B] is the left padding of each row: nothing attends to it, and
        positions count from the first real token. With `cached_hidden` [B, T, C], the result of
        `run_blocks(idx, start_layer)`, the embeddings and the first `start_layer` blocks do not run. `segments` [B, T]
        numbers several texts of a row in order: a token attends to its own text, where positions count from its start.
        """
        n_layers = self.config.n_layers
        return self.final_norm(self.run_blocks(idx, n_layers, cache, pad, cached_hidden, start_layer, segments))

    def run_blocks(
        self,
        idx: Tensor,
        n_blocks: int,
        cache: KVCache | None = None,
        pad: Tensor | None = None,
        cached_hidden: Tensor | None = None,
        start_layer: int = 0,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream [B, T, C] after the first `n_blocks` blocks; arguments as in `hidden_states`."""
        T = idx.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.context_length:
            raise ValueError(f"{start + T} tokens exceed the context length {self.config.context_length}")
        positions = torch.arange(start, start + T, device=idx.device)  # [T]
        masks = []  # of each kind of layer
        for kind in self.kinds:
            narrow = kind.window is not None and start + T > kind.window
            needed = pad is not None or (start > 0 and T > 1) or narrow or segments is not None
            masks.append(self.mask(positions, start + T, pad, kind.window) if needed else None)
        if pad is not None:
            positions = (positions - pad[:, None]).clamp(min=0)  # [B, T]
        if segments is not None:
            same = (segments[:, :, None] == segments[:, None, :])[:, None]  # [B, 1, T, T]
            masks = [mask & same for mask in masks if mask is not None]
            positions = positions - torch.searchsorted(segments, segments)  # [B, T]

        angles = [self.cos_sin(kind, positions) for kind in self.kinds]
        x = self.embed(idx, positions) if cached_hidden is None else cached_hidden  # [B, T, C]
        for block, kind_index in islice(zip(self.blocks, self.kind_of_layer, strict=True), start_layer, n_blocks):
            cos_sin, mask = angles[kind_index], masks[kind_index]
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos_sin, mask, None, use_reentrant=False)
            else:
                x = block(x, cos_sin, mask, cache)
        if cache is not None:
            cache.length += T
        return x

    def cos_sin(self, kind: LayerKind, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return `rotary_cos_sin` of the positions in layers of a kind, or None where positions are learned."""
        if self.config.positions == "learned":
            return None
        return rotary_cos_sin(kind, self.config.rotary_dim or self.config.head_dim, positions)

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Return the input [B, T, C] of the first block, for token ids [B, T] at `positions` [T] or [B, T]."""
        x = self.tok_emb(idx)  # [B, T, C]
        if self.config.embedding_scale is not None:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # rounded to it, as Gemma's is
        if self.config.positions == "learned":
            x = x + self.pos_emb(positions)
        return self.drop(x)

    def mask(self, positions: Tensor, n_keys: int, pad: Tensor | None, window: int | None) -> Tensor:
        """Return the attention mask [1 or B, 1, T, S] of queries at `positions` [T]; True is visible."""
        keys = torch.arange(n_keys, device=positions.device)  # [S]
        mask = (keys <= positions[:, None])[None, None]  # [1, 1, T, S]
        if window is not None:
            mask = mask & (keys > positions[:, None] - window)
        if pad is not None:
            mask = mask & (keys >= pad[:, None])[:, None, None]  # [B, 1, T, S]
            mask = mask | (keys == positions[:, None])  # a padding query sees itself: an empty row would give NaN
        return mask

    def forward(self, idx: Tensor, cache: KVCache | None = None, pad: Tensor | None = None) -> Tensor:
        """Return the logits [B, T, V] of token ids [B, T]; cache and pad as in `hidden_states`."""
        return self.lm_head(self.hidden_states(idx, cache, pad))
