"""Example inputs: small models of the kinds that people write, and the inputs that are inferred for each."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quack_fx.targets import resolve
from quack_fx.targets.inputs import ROOM, Attempts, infer, retry
from quack_fx.targets.inputs.changes import LARGEST
from quack_fx.targets.inputs.values import named

pytestmark = pytest.mark.usefixtures("own_folder")

HEAD = """
from __future__ import annotations
import numpy as np
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

class Block(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.n_heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def split(self, x):
        b, t, d = x.size()
        return x.view(b, t, self.n_heads, -1).transpose(1, 2)

    def forward(self, x, mask=None, freqs_cis=None, cos=None, sin=None, past=None):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if freqs_cis is not None:
            q, k = (torch.view_as_complex(i.unflatten(-1, (-1, 2))) * freqs_cis for i in (q, k))
            q, k = (torch.view_as_real(i).flatten(3) for i in (q, k))
        if cos is not None:
            (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
            q, k = torch.cat((q1 * cos - q2 * sin, q1 * sin), -1), torch.cat((k1 * cos, k2 * sin), -1)
        scores = q @ k.transpose(-2, -1) / 2
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

class Windows(Block):
    def __init__(self, size):
        super().__init__()
        self.size, self.of_windows = size, nn.Linear(8, 8)
    def forward(self, x):
        windows = x[:, : x.shape[1] // self.size * self.size].unflatten(1, (-1, self.size)).mean(2)
        k, v = self.k(x), self.v(x)
        if windows.shape[1]:
            k, v = torch.cat((k, self.of_windows(windows)), 1), torch.cat((v, windows), 1)
        q, k, v = self.split(self.q(x)), self.split(k), self.split(v)
        return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)

class Mlp(nn.Module):
    def __init__(self, width, out=8):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, out), nn.Linear(out, out)
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))
"""

LM = "self.e, self.head = nn.Embedding(50, 8), nn.Linear(8, 50); self.layers = nn.ModuleList([Block(), Block()])"

CASES: dict[str, tuple[str, str, str, str | None]] = {
    # ---- language models ---------------------------------------------------------------------------------------------
    "targets are required": (
        LM,
        "idx, targets",
        "return F.cross_entropy(self.head(self.layers[0](self.e(idx))).view(-1, 50), targets.view(-1))",
        "idx=int64[2, 4], targets=int64[2, 4]",
    ),
    "one sequence without a batch": (
        LM,
        "input_seq, target_seq",
        """
        assert input_seq.ndim == 1
        x = self.e(input_seq)[None]
        return F.cross_entropy(self.head(self.layers[0](x)).view(-1, 50), target_seq)
        """,
        "input_seq=int64[4], target_seq=int64[4]",
    ),
    "a sequence of whole blocks": (
        LM,
        "input_seq: Tensor, target_seq: Tensor, sliding_window_num_blocks: Tensor",
        """
        BLOCK = 128
        assert input_seq.ndim == 1
        assert len(input_seq) % BLOCK == 0
        docs = (input_seq == 0).cumsum(0)
        x = self.layers[0](self.e(input_seq)[None]) * sliding_window_num_blocks
        return F.cross_entropy(self.head(x).view(-1, 50), target_seq)
        """,
        None,
    ),
    "a mask and a cache that is indexed by layer": (
        LM,
        "input_ids, attention_mask, past_key_values, use_cache",
        """
        x = self.e(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, attention_mask[:, None, None, :], past=past_key_values[i])
        return self.head(x)
        """,
        None,
    ),
    "a short context": (
        LM + "; self.block_size = 3; self.pos = nn.Embedding(3, 8)",
        "idx, targets=None",
        """
        B, T = idx.size()
        assert T <= self.block_size, f"Cannot forward sequence of length {T}, block size is only {self.block_size}"
        return self.head(self.layers[0](self.e(idx) + self.pos(torch.arange(T))))
        """,
        "idx=int64[2, 3]",
    ),
    # ---- sequence to sequence ----------------------------------------------------------------------------------------
    "two vocabularies": (
        "self.src = nn.Embedding(50, 8); self.trg = nn.Embedding(3, 8); self.b = Block()",
        "src_seq, trg_seq",
        "return self.b(self.src(src_seq)) + self.b(self.trg(trg_seq))",
        "src_seq=int64[2, 4], trg_seq=int64[2, 4]",
    ),
    "masks of the caller": (
        "self.e = nn.Embedding(50, 8); self.d = nn.Embedding(40, 8); self.b = Block()",
        "src, tgt, src_mask, tgt_mask",
        "return self.b(self.e(src), src_mask.unsqueeze(1)) + self.b(self.d(tgt), tgt_mask.unsqueeze(1))",
        "src=int64[2, 4], tgt=int64[2, 4], src_mask=bool[2, 4, 4], tgt_mask=bool[2, 4, 4]",
    ),
    "masks for torch's own layers": (
        "self.e = nn.Embedding(50, 8); self.t = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)",
        "src, tgt, tgt_mask, src_key_padding_mask",
        "return self.t(self.e(src), self.e(tgt), tgt_mask=tgt_mask, src_key_padding_mask=src_key_padding_mask)",
        "src=int64[2, 4], tgt=int64[2, 4], tgt_mask=None, src_key_padding_mask=None",
    ),
    # ---- rotations ---------------------------------------------------------------------------------------------------
    "rotations as complex numbers": (
        LM,
        "tokens, freqs_cis",
        "return self.head(self.layers[0](self.e(tokens), freqs_cis=freqs_cis))",
        "tokens=int64[2, 4], freqs_cis=complex64[4, 2]",
    ),
    "rotations as cosines and sines": (
        LM,
        "x, cos, sin",
        "return self.layers[0](self.e(x), cos=cos, sin=sin)",
        "x=int64[2, 4], cos=float32[4, 2], sin=float32[4, 2]",
    ),
    "rotations as a pair": (
        LM,
        "x, rope",
        "cos, sin = rope; return self.layers[0](self.e(x), cos=cos, sin=sin)",
        "x=int64[2, 4], rope=(float32[4, 2], float32[4, 2])",
    ),
    # ---- vision ------------------------------------------------------------------------------------------------------
    "an image of an asserted size": (
        "self.size = (40, 48); self.c = nn.Conv2d(3, 8, 8, 8); self.b = Block()",
        "x",
        """
        B, C, H, W = x.shape
        assert H == self.size[0] and W == self.size[1], f"Input image size ({H}*{W}) doesn't match model"
        return self.b(self.c(x).flatten(2).transpose(1, 2))
        """,
        "x=float32[2, 3, 40, 48]",
    ),
    "a video of images": (
        "self.c = nn.Conv2d(3, 8, 8, 8); self.b = Block()",
        "x",
        "b, t, c, h, w = x.shape; return self.b(self.c(x.reshape(b * t, c, h, w)).flatten(2).transpose(1, 2))",
        "x=float32[2, 4, 3, 32, 32]",
    ),
    "a video": (
        "self.c = nn.Conv3d(3, 8, (2, 8, 8), (2, 8, 8)); self.b = Block()",
        "x",
        "return self.b(self.c(x).flatten(2).transpose(1, 2))",
        "x=float32[2, 3, 4, 32, 32]",
    ),
    "points": (
        "self.c = nn.Conv1d(3, 8, 1); self.b = Block()",
        "pts",
        "return self.b(self.c(pts.transpose(1, 2)).transpose(1, 2))",
        "pts=float32[2, 4, 3]",
    ),
    "patches by einops, and positions": (
        "self.p = nn.Sequential(Rearrange('b c (h p1) (w p2) -> b (h w) (p1 p2 c)', p1=4, p2=4), nn.Linear(48, 8))\n"
        "self.b, self.pos = Block(), nn.Parameter(torch.zeros(1, 37, 8))",
        "img",
        "x = self.p(img); return self.b(torch.cat((x[:, :1], x), 1) + self.pos)",
        "img=float32[2, 3, 24, 24]",
    ),
    "patches by reshaping": (
        "self.p, self.image_size = 4, 32; self.l = nn.Linear(48, 8); self.b = Block()",
        "img",
        """
        b, c, h, w = img.shape
        x = img.view(b, c, h // self.p, self.p, w // self.p, self.p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.b(self.l(x))
        """,
        "img=float32[2, 3, 32, 32]",
    ),
    # ---- diffusion ---------------------------------------------------------------------------------------------------
    "noise, a time step, a class": (
        "self.c = nn.Conv2d(4, 8, 2, 2); self.t = Mlp(4); self.y = nn.Embedding(11, 8); self.b = Block()",
        "x, t, y",
        """
        freq = t[:, None].float() * torch.arange(4)[None]
        c = self.t(freq) + self.y(y)
        return self.b(self.c(x).flatten(2).transpose(1, 2) + c.unsqueeze(1))
        """,
        "x=float32[2, 4, 32, 32], t=float32[2], y=int64[2]",
    ),
    "Flux": (
        "self.img_in, self.txt_in, self.vec_in, self.b = nn.Linear(6, 8), nn.Linear(10, 8), Mlp(12), Block()",
        "img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor, guidance=None",
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError("Input img and txt tensors must have 3 dimensions.")
        vec = (timesteps * 2)[:, None] + self.vec_in(y)
        ids = torch.cat((txt_ids, img_ids), dim=1)
        cos = (ids[..., :1] * 1.0).unsqueeze(1).expand(-1, -1, -1, 2).cos()
        return self.b(torch.cat((self.txt_in(txt), self.img_in(img)), 1) + vec[:, None], cos=cos, sin=cos)
        """,
        "img=float32[2, 4, 6], img_ids=float32[2, 4, 3], txt=float32[2, 4, 10], txt_ids=float32[2, 4, 3], "
        "timesteps=float32[2], y=float32[2, 12]",
    ),
    # ---- audio -------------------------------------------------------------------------------------------------------
    "mel frames with lengths": (
        "self.l = nn.Linear(10, 8); self.b = Block()",
        "inputs, input_lengths",
        "mask = torch.arange(inputs.size(1))[None] < input_lengths[:, None]; return self.b(self.l(inputs)), mask",
        "inputs=float32[2, 4, 10], input_lengths=int64[2]",
    ),
    "mel channels first": (
        "self.c = nn.Conv1d(10, 8, 3, padding=1); self.b = Block()",
        "mel",
        "return self.b(self.c(mel).transpose(1, 2))",
        "mel=float32[2, 10, 4]",
    ),
    "mel frames as an image of one channel": (
        "self.c, self.l, self.b = nn.Conv2d(1, 8, 3, 2), nn.Linear(312, 8), Block()",
        "inputs, input_lengths",
        "x = self.c(inputs.unsqueeze(1)); return self.b(self.l(x.permute(0, 2, 1, 3).flatten(2)))",
        "inputs=float32[2, 64, 80], input_lengths=int64[2]",
    ),
    "a waveform": (
        "self.c = nn.Conv1d(1, 8, 10, 5); self.b = Block()",
        "wav",
        "return self.b(self.c(wav.unsqueeze(1)).transpose(1, 2))",
        "wav=float32[2, 64]",
    ),
    # ---- time series -------------------------------------------------------------------------------------------------
    "a forecaster with marks": (
        "self.pred_len = 2; self.v, self.m, self.b = nn.Conv1d(7, 8, 1), nn.Linear(3, 8), Block()",
        "x_enc, x_mark_enc, x_dec, x_mark_dec, mask=None",
        """
        def embed(x, mark): return x
        e = self.v(x_enc.permute(0, 2, 1)).transpose(1, 2) + self.m(x_mark_enc)
        d = self.v(x_dec.permute(0, 2, 1)).transpose(1, 2) + self.m(x_mark_dec)
        return (self.b(e) + self.b(d))[:, -self.pred_len:]
        """,
        "x_enc=float32[2, 4, 7], x_mark_enc=float32[2, 4, 3], x_dec=float32[2, 4, 7], x_mark_dec=float32[2, 4, 3]",
    ),
    "variates as tokens": (
        "self.l, self.b = nn.Linear(24, 8), Block()",
        "x_enc",
        "B, L, N = x_enc.shape; x = x_enc - x_enc.mean(1, keepdim=True); return self.b(self.l(x_enc.permute(0, 2, 1)))",
        "x_enc=float32[2, 24, 4]",
    ),
    # ---- recommenders ------------------------------------------------------------------------------------------------
    "SASRec": (
        "self.item_emb = nn.Embedding(50, 8); self.pos_emb = nn.Embedding(20, 8); self.b = Block()",
        "user_ids, log_seqs, pos_seqs, neg_seqs",
        """
        feats = self.log2feats(log_seqs)
        pos = self.item_emb(torch.LongTensor(pos_seqs))
        neg = self.item_emb(torch.LongTensor(neg_seqs))
        return (feats * pos).sum(-1), (feats * neg).sum(-1)

    def log2feats(self, log_seqs):
        seqs = self.item_emb(torch.LongTensor(log_seqs))
        poss = np.tile(np.arange(1, log_seqs.shape[1] + 1), [log_seqs.shape[0], 1])
        poss *= log_seqs != 0
        return self.b(seqs + self.pos_emb(torch.LongTensor(poss)))
        """,
        "user_ids=int64[2], log_seqs=numpy int64[2, 4], pos_seqs=numpy int64[2, 4], neg_seqs=numpy int64[2, 4]",
    ),
    "a table of fields": (
        "self.es = nn.ModuleList(nn.Embedding(n, 8) for n in (10, 20, 3)); self.b = Block()",
        "x",
        "return self.b(torch.stack([e(x[:, i]) for i, e in enumerate(self.es)], 1))",
        "x=int64[2, 3]",
    ),
    "sparse and dense features": (
        "self.es = nn.ModuleList(nn.Embedding(n, 8) for n in (10, 20, 3)); self.m = Mlp(13); self.b = Block()",
        "sparse, dense",
        """
        tokens = [self.m(dense)]
        for i in range(len(self.es)):
            tokens.append(self.es[i](sparse[:, i].long()))
        return self.b(torch.stack(tokens, 1))
        """,
        "sparse=int64[2, 3], dense=float32[2, 13]",
    ),
    # ---- biology, decisions ------------------------------------------------------------------------------------------
    "an alignment": (
        LM,
        "tokens",
        "assert tokens.ndim == 3; B, N, L = tokens.size(); return self.layers[0](self.e(tokens).view(B * N, L, -1))",
        "tokens=int64[2, 3, 4]",
    ),
    "pairs": (
        "self.n = nn.LayerNorm(8); self.b = Block()",
        "z",
        "b, i, j, d = z.shape; return self.b(self.n(z).view(b * i, j, d))",
        "z=float32[2, 4, 4, 8]",
    ),
    "coordinates beside residues": (
        "self.e, self.c, self.b = nn.Embedding(21, 8), nn.Linear(3, 8), Block()",
        "seq, coords, mask",
        "return self.b(self.e(seq) + self.c(coords)) * mask.unsqueeze(-1)",
        "seq=int64[2, 4], coords=float32[2, 4, 3], mask=bool[2, 4]",
    ),
    "decisions": (
        "self.et, self.er, self.es, self.ea = nn.Embedding(9, 8), nn.Linear(1, 8), nn.Linear(17, 8), nn.Linear(6, 8)\n"
        "self.b = Block()",
        "states, actions, rewards, returns_to_go, timesteps, attention_mask=None",
        """
        B, T = states.shape[0], states.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones((B, T), dtype=torch.long)
        time = self.et(timesteps)
        s, a, r = self.es(states) + time, self.ea(actions) + time, self.er(returns_to_go) + time
        x = torch.stack((r, s, a), dim=1).permute(0, 2, 1, 3).reshape(B, 3 * T, 8)
        return self.b(x)
        """,
        None,
    ),
    "a graph": (
        "self.l, self.b = nn.Linear(5, 8), Block()",
        "x, edge_index",
        "x = self.l(x); return self.b(x[edge_index[0]].unsqueeze(0) if x.dim() == 2 else x[:, edge_index[0]])",
        "x=float32[2, 4, 5], edge_index=int64[2, 4]",
    ),
    # ---- dicts, namespaces, tuples -----------------------------------------------------------------------------------
    "a dict": (
        LM,
        "batch",
        """
        x = self.layers[0](self.e(batch["input_ids"]), batch["attention_mask"][:, None, None])
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())
        """,
        "batch={'input_ids': int64[2, 4], 'attention_mask': bool[2, 4], 'labels': int64[2, 4]}",
    ),
    "a namespace": (
        "self.l, self.b = nn.Linear(5, 8), Block()",
        "data",
        "return self.b(self.l(data.feats))",
        "data=namespace(feats=float32[2, 4, 5])",
    ),
    "an image in a dict": (
        "self.c = nn.Conv2d(3, 8, 8, 8); self.b = Block()",
        "sample: dict",
        "return self.b(self.c(sample['image']).flatten(2).mT)",
        "sample={'image': float32[2, 3, 32, 32]}",
    ),
    "keywords": (
        LM,
        "**batch",
        "return self.layers[0](self.e(batch['input_ids']))",
        "input_ids=int64[2, 4]",
    ),
    "a pair": (
        "self.l, self.b = nn.Linear(5, 8), Block()",
        "inputs",
        "x, mask = inputs; return self.b(self.l(x) * mask.unsqueeze(-1))",
        "inputs=(float32[2, 4, 5], bool[2, 4])",
    ),
    "anything": (
        "self.l, self.b = nn.Linear(5, 8), Block()",
        "*args, **kwargs",
        "return self.b(self.l(args[0]))",
        "float32[2, 4, 5]",
    ),
    # ---- two modalities ----------------------------------------------------------------------------------------------
    "an image and a text": (
        "self.e, self.c, self.b = nn.Embedding(52, 8), nn.Conv2d(3, 8, 8, 8), Block()",
        "image, text",
        "return self.b(self.c(image).flatten(2).mT), self.b(self.e(text))",
        "image=float32[2, 3, 32, 32], text=int64[2, 4]",
    ),
    "captions with lengths": (
        "self.c, self.e, self.b = nn.Conv2d(3, 8, 8, 8), nn.Embedding(52, 8), Block()",
        "images, captions, lengths",
        "x = torch.cat((self.c(images).flatten(2).mT, self.e(captions)), 1); return self.b(x) * lengths[:, None, None]",
        "images=float32[2, 3, 32, 32], captions=int64[2, 4], lengths=int64[2]",
    ),
    "layers that the forward picks by name": (
        "self.parts = nn.ModuleDict({'a': nn.Linear(5, 8), 'b': nn.Linear(6, 8)}); self.b = Block()",
        "a, b",
        "return self.b(self.parts['a'](a) + self.parts['b'](b))",
        "a=float32[2, 4, 5], b=float32[2, 4, 6]",
    ),
    # ---- told by the error of a first try ----------------------------------------------------------------------------
    "learned positions of every token": (
        "self.l, self.b = nn.Linear(5, 8), Block(); self.pos = nn.Parameter(torch.zeros(1, 12, 8))",
        "x",
        "return self.b(self.l(x) + self.pos)",
        "x=float32[2, 12, 5]",
    ),
    "offsets of fields": (
        "self.e, self.b = nn.Embedding(50, 8), Block(); self.register_buffer('offsets', torch.arange(3))",
        "x",
        "offsets = self.offsets.clone().unsqueeze(0); return self.b(self.e(x + offsets))",
        "x=int64[2, 3]",
    ),
    "an image that is flattened behind a convolution": (
        "self.c, self.l, self.b = nn.Conv2d(3, 8, 4, 4), nn.Linear(288, 8), Block()",
        "x",
        "return self.b(self.l(self.c(x).flatten(1))[:, None])",
        "x=float32[2, 3, 24, 24]",
    ),
    "a multiple far from the parameters": (
        "self.l, self.b, self.window = nn.Linear(5, 8), Block(), 6",
        "x",
        """
        x = self.l(x)
        n = x.size(1)
        if n % self.window != 0:
            raise ValueError("not a multiple of the window")
        return self.b(x)
        """,
        "x=float32[2, 6, 5]",
    ),
    "a shape that is unpacked far from the parameters": (
        "self.c, self.b = nn.Conv2d(3, 8, 8, 8), Block()",
        "x, other",
        """
        batch, frames, channels, height, width = torch.stack([other, other])[0].shape
        return self.b(self.c(x).flatten(2).mT)
        """,
        "x=float32[2, 3, 32, 32], other=float32[2, 4, 3, 32, 32]",
    ),
    "tokens without a batch": (
        "self.e, self.b = nn.Embedding(9, 8), Block()",
        "x",
        """
        x = self.e(x)
        n = x.shape[0]
        assert x.shape == (n, 8)
        return self.b(x[None])
        """,
        "x=int64[4]",
    ),
    "an optional argument that a check asks for": (
        "self.l, self.b = nn.Linear(5, 8), Block()",
        "x, strength=None",
        """
        if strength is None:
            raise ValueError("nothing says how strong")
        return self.b(self.l(x)) * strength.mean()
        """,
        "x=float32[2, 4, 5], strength=float32[2, 4, 5]",
    ),
    "a size that the message names": (
        "self.l, self.b, self.seq_len = nn.Linear(5, 8), Block(), 10",
        "x",
        """
        n = len(list(self.l(x)[0]))
        ok = n == self.seq_len
        if not ok:
            raise RuntimeError(f"Input has length {n}, expected {self.seq_len}")
        return self.b(self.l(x))
        """,
        "x=float32[2, 10, 5]",
    ),
    "a time step of each token of a trajectory": (
        "self.s, self.a, self.t, self.b = nn.Linear(5, 8), nn.Linear(3, 8), nn.Embedding(50, 8), Block()",
        "states, actions, rewards, timesteps",
        """
        t = self.t(timesteps)
        assert t.shape == (*states.shape[:2], 8) or states.shape[0] != states.shape[1]
        return self.b(torch.stack((self.s(states) + t, self.a(actions) + t), 2).flatten(1, 2))
        """,
        None,
    ),
    # ---- dtypes ------------------------------------------------------------------------------------------------------
    "weights of bfloat16": (
        "self.l, self.b = nn.Linear(5, 8), Block(); self.to(torch.bfloat16)",
        "x",
        "return self.b(self.l(x))",
        "x=bfloat16[2, 4, 5]",
    ),
    # ---- long sequences, where parts of an attention run on those only -----------------------------------------------
    "keys of windows": (
        "self.e, self.b, self.blocks = nn.Embedding(50, 8), Block(), nn.ModuleList([Windows(100), Windows(100)])",
        "idx",
        "return self.blocks[1](self.blocks[0](self.b(self.e(idx))))",
        "idx=int64[2, 512]",
    ),
    "keys of windows, few positions": (
        "self.e, self.p, self.b = nn.Embedding(50, 8), nn.Parameter(torch.zeros(128, 8)), Windows(16)",
        "idx, mask=None",
        "return self.b(self.e(idx) + self.p[: idx.shape[1]].expand(idx.shape[1], 8))",
        "idx=int64[2, 64]",
    ),
    "parameters that no length reaches": (
        "self.e, self.b = nn.Embedding(50, 8), Windows(5000)",
        "idx",
        "return self.b(self.e(idx))",
        "idx=int64[2, 4]",
    ),
    "parameters outside attention": (
        "self.e, self.b, self.rest = nn.Embedding(50, 8), Block(), nn.Linear(8, 8)",
        "idx",
        "return self.b(self.e(idx)) if idx.shape[1] < 64 else self.rest(self.b(self.e(idx)))",
        "idx=int64[2, 4]",
    ),
}  # fmt: skip


def write(init: str, parameters: str, body: str) -> str:
    source = f"""
class Model(nn.Module):
    def __init__(self):
        super().__init__()
{indent(dedent(init), " " * 8)}

    def forward(self, {parameters}):
{indent(dedent(body), " " * 8) if not body.startswith(chr(10)) else body}
"""
    Path("model.py").write_text(HEAD + source)
    return "model.py:Model"


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_inferred(case: str) -> None:
    init, parameters, body, text = CASES[case]
    target = resolve(write(init, parameters, body))
    if text is not None:
        assert f"inputs {text} (inferred)" in target.how
    real = resolve("model.py", build="Model()", real=True).model
    real(*target.args, **target.kwargs)  # true for the module itself, not only for its recording


VALUES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a tensor": ((torch.ones(2, 3),), {}),
    "ids and a keyword": ((torch.ones(2, 3, dtype=torch.int64),), {"mask": torch.zeros(4, dtype=torch.bool)}),
    "a dict alone": (({"ids": torch.ones(2, 3, dtype=torch.int64), "size": 3},), {}),
    "a tuple alone": (((torch.ones(2, dtype=torch.complex64), None),), {}),
    "a list of caches": (([None, None, None], torch.ones(())), {}),
    "a namespace": ((SimpleNamespace(x=torch.ones(2, dtype=torch.bfloat16)), False), {}),
    "an array": ((np.ones((2, 4), dtype=np.int64),), {}),
    "keywords alone": ((), {"x": torch.ones(2, 3, dtype=torch.int32)}),
}


def kinds(value: Any) -> Any:
    """Types and shapes in a value."""
    if isinstance(value, SimpleNamespace):
        return kinds(vars(value))
    if isinstance(value, dict):
        return {name: kinds(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(kinds, value))
    return (type(value), value.dtype, tuple(value.shape)) if hasattr(value, "shape") else value


@pytest.mark.parametrize("case", VALUES)
def test_the_expression_makes_such_inputs_again(case: str) -> None:
    args, kwargs = VALUES[case]
    expression = named(args, kwargs, [""] * len(args)).expression()
    Path("model.py").write_text(
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.l = nn.Linear(2, 2)\n"
        "    def forward(self, *args, **kwargs):\n        return self.l(torch.ones(2))\n"
    )
    target = resolve("model.py", inputs=expression)
    assert kinds(target.args) == kinds(args) and kinds(target.kwargs) == kinds(kwargs)


def test_no_candidate_takes_all_memory() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.img_size = nn.Linear(512, 8), 512
            self.layers = nn.ModuleList(nn.Conv3d(3, 8, (n, 8, 8), (n, 8, 8)) for n in range(2, 9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, _, _, h, w = x.shape
            assert h == 512 and w == 512
            return self.layers[0](x)

    made = [inputs.args[0] for inputs in infer(Clip(), "Clip")]
    assert max(x.numel() for x in made) <= LARGEST and sum(x.numel() for x in made) <= ROOM


def test_few_candidates_are_tried() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Conv2d(3, 8, 8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no {len(x)} but 3 or 5, 7, 9, 11, 13")

    model = Refuses()
    attempts = Attempts(model, infer(model, "Refuses"))
    tried = []
    for inputs in attempts:
        tried.append(inputs.text)
        try:
            model(*inputs.args, **inputs.kwargs)
        except RuntimeError as error:
            attempts.failed(inputs, error)
    assert len(tried) == len(set(tried)) <= 60


def test_the_model_stays_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(5, 8), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layer(x)

    model = Counts()
    assert infer(model, "Counts")[0].text == "x=float32[2, 4, 5]"
    assert model.calls == 0


@pytest.mark.parametrize(("size", "can"), [(16, True), (40000, False)])
def test_a_repair_makes_no_tensor_that_takes_all_memory(size: int, can: bool) -> None:
    given = named((torch.randn(2, 4, 64, 64),), {}, ["x"])
    error = RuntimeError(
        f"The size of tensor a (4) must match the size of tensor b ({size}) at non-singleton dimension 1"
    )
    repaired = retry(nn.Linear(4, 4), given, error)
    assert bool(repaired) is can and all(inputs.args[0].numel() <= LARGEST for inputs in repaired)
