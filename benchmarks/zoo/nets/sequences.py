"Nets for sequences: rows of an image, words, waves, films."
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import LinearDecoder
from fastai.torch_core import Module
from torch import nn

from .images import conv


class Recurrent(Module):
    "Reads an image row by row, answers after the last; `repeat` reads it several times, so that time is longer."
    def __init__(self, cell='RNN', hidden=32, repeat=1, last='last', **kwargs):
        self.rnn, self.head = getattr(nn, cell)(14, hidden, batch_first=True, **kwargs), nn.Linear(hidden, 10)
        self.repeat = repeat
    def forward(self, x): return self.head(self.rnn(x.repeat(1, self.repeat, 1))[0][:, -1])

class SigmoidRNN(Module):
    def __init__(self, hidden=32, act=nn.Tanh):
        self.inp, self.rec, self.act = nn.Linear(14, hidden), nn.Linear(hidden, hidden), act()
        self.head = nn.Linear(hidden, 10)
    def forward(self, x):
        h = x.new_zeros(len(x), self.rec.in_features)
        for t in range(x.shape[1]): h = self.act(self.inp(x[:, t]) + self.rec(h))
        return self.head(h)

class Layer(Module):
    def __init__(self, d, heads=2):
        self.norm1, self.attn = nn.LayerNorm(d), nn.MultiheadAttention(d, heads, batch_first=True)
        self.norm2, self.up, self.act, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)
    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h = self.norm1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm2(x))))

class Transformer(Module):
    def __init__(self, vocab=100, d=32, depth=2, n=16):
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Parameter(.02 * torch.randn(n, d))
        self.blocks = nn.Sequential(*[Layer(d) for _ in range(depth)])
        self.norm, self.head, self.softmax = nn.LayerNorm(d), nn.Linear(d, vocab), False
        nn.init.normal_(self.tok.weight, std=.1)
    def forward(self, x):
        x = self.head(self.norm(self.blocks(self.tok(x) + self.pos)))
        return (x.softmax(-1) if self.softmax else x).transpose(1, 2)

class GRU(Module):
    "Characters in, characters out."
    def __init__(self, vocab=100, d=16, hidden=32):
        self.tok, self.rnn = nn.Embedding(vocab, d), nn.GRU(d, hidden, batch_first=True)
        self.head, self.softmax = nn.Linear(hidden, vocab), False
    def forward(self, x):
        x = self.head(self.rnn(self.tok(x))[0])
        return (x.softmax(-1) if self.softmax else x).transpose(1, 2)

def tcn(depth=4, c=16):
    "Dilated convolutions over time."
    layers, n = [], 2
    for i in range(depth):
        layers += [nn.Conv1d(n, c, 3, padding=2 ** (i % 4), dilation=2 ** (i % 4)), nn.ReLU()]
        n = c
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(c, 5))

class TextCNN(Module):
    "Words, convolutions of several widths over them, the largest answer of each."
    def __init__(self, vocab=300, d=16, c=16, drop=0.):
        self.emb   = nn.Embedding(vocab, d)
        self.convs = nn.ModuleList([nn.Conv1d(d, c, k) for k in (1, 2, 3)])
        self.act1, self.fc, self.act2, self.drop = nn.ReLU(), nn.Linear(3 * c, 32), nn.ReLU(), nn.Dropout(drop)
        self.head  = nn.Linear(32, 4)
    def forward(self, x):
        x = self.emb(x).transpose(1, 2)
        x = self.act1(torch.cat([conv(x).amax(2) for conv in self.convs], 1))
        return self.head(self.drop(self.act2(self.fc(x))))

class Tagger(Module):
    "A bidirectional LSTM: one tag a word."
    def __init__(self, vocab=60, d=16, hidden=16, tags=4):
        self.emb, self.rnn = nn.Embedding(vocab, d), nn.LSTM(d, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, tags)
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0]).transpose(1, 2)

class Seq2Seq(Module):
    "A GRU reads, another one writes and attends to what was read."
    def __init__(self, vocab=10, d=16, hidden=32, n=6):
        self.n, self.emb = n, nn.Embedding(vocab, d)
        self.enc, self.dec = nn.GRU(d, hidden, batch_first=True), nn.GRU(d, hidden, batch_first=True)
        self.query, self.mix = nn.Linear(hidden, hidden), nn.Linear(2 * hidden, hidden)
        self.act, self.head  = nn.Tanh(), nn.Linear(hidden, vocab)
    def forward(self, x):
        x = self.emb(x)
        read, last = self.enc(x[:, :self.n])
        said = self.dec(x[:, self.n:], last)[0]
        seen = (self.query(said) @ read.transpose(1, 2)).softmax(2) @ read
        return self.head(self.act(self.mix(torch.cat([said, seen], 2)))).transpose(1, 2)

class GatedLM(Module):
    "A causal language model of gated convolutions."
    def __init__(self, vocab=100, d=32, depth=3):
        self.emb = nn.Embedding(vocab, d)
        self.convs = nn.ModuleList([nn.Conv1d(d, 2 * d, 3) for _ in range(depth)])
        self.gates = nn.ModuleList([nn.GLU(1) for _ in range(depth)])
        self.head  = nn.Linear(d, vocab)
        nn.init.normal_(self.emb.weight, std=.3)
    def forward(self, x):
        x = self.emb(x).transpose(1, 2)
        for new, gate in zip(self.convs, self.gates): x = x + gate(new(F.pad(x, (2, 0))))
        return self.head(x.transpose(1, 2)).transpose(1, 2)

class Diagonal(Module):
    "A linear recurrence of each channel, diagonal and complex, as a convolution: slow decay is long memory."
    def __init__(self, d, n=8, decay=.01):
        self.decay = nn.Parameter(torch.full((d, n), math.log(decay)))
        self.freq  = nn.Parameter(torch.arange(n).float().repeat(d, 1) * .2)
        self.c, self.skip = nn.Parameter(torch.randn(2, d, n) * (.5 / n) ** .5), nn.Parameter(torch.ones(d))
    def forward(self, x):
        n = x.shape[2]
        t = torch.arange(n, device=x.device)[:, None, None]
        e = torch.exp(-self.decay.exp() * t)
        k = (e * (self.c[0] * torch.cos(self.freq * t) - self.c[1] * torch.sin(self.freq * t))).sum(2).T
        y = torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(k, 2 * n), 2 * n)[..., :n]
        return y + self.skip[:, None] * x

class SSM(Module):
    "A stack of linear recurrences with a gated mixing of channels, answers after the last step or with the mean."
    def __init__(self, c_in=2, d=16, depth=2, n_out=5, decay=.02, last=False, drop=0.):
        self.inp, self.last = nn.Linear(c_in, d), last
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(depth)])
        self.ssms  = nn.ModuleList([Diagonal(d, decay=decay) for _ in range(depth)])
        self.acts, self.drop = nn.ModuleList([nn.GELU() for _ in range(depth)]), nn.Dropout(drop)
        self.mixes, self.head = nn.ModuleList([nn.Linear(d, d) for _ in range(depth)]), nn.Linear(d, n_out)
    def forward(self, x):
        x = self.inp(x.transpose(1, 2))
        for norm, ssm, act, mix in zip(self.norms, self.ssms, self.acts, self.mixes):
            x = x + self.drop(mix(act(ssm(norm(x).transpose(1, 2)).transpose(1, 2))))
        return self.head(x[:, -1] if self.last else x.mean(1))

class Retain(Module):
    "Attention without softmax that forgets at a fixed rate, one for each head; then two layers."
    def __init__(self, d, heads=2):
        self.heads, self.norm1, self.qkv = heads, nn.LayerNorm(d), nn.Linear(d, 3 * d, bias=False)
        self.group, self.out = nn.GroupNorm(heads, d), nn.Linear(d, d)
        self.norm2, self.up, self.act, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        i    = torch.arange(n, device=x.device)
        lag  = (i[:, None] - i).clamp(min=0)
        keep = 1 - 2. ** (-2 - torch.arange(self.heads, device=x.device))
        mask = (keep[:, None, None] ** lag).tril()
        y = ((q @ k.transpose(2, 3)) * mask / q.shape[3] ** .5) @ v
        x = x + self.out(self.group(y.transpose(1, 2).reshape(b * n, d)).view(b, n, d))
        return x + self.down(self.act(self.up(self.norm2(x))))

class RetNet(Module):
    def __init__(self, vocab=100, d=32, depth=2, tied=False):
        self.tok, self.blocks = nn.Embedding(vocab, d), nn.Sequential(*[Retain(d) for _ in range(depth)])
        self.norm, self.head  = nn.LayerNorm(d), nn.Linear(d, vocab)
        nn.init.normal_(self.tok.weight, std=.2)
        if tied: self.head.weight = self.tok.weight
    def forward(self, x): return self.head(self.norm(self.blocks(self.tok(x)))).transpose(1, 2)

class Attend(Module):
    "An LSTM over the words; a small net weighs its states."
    def __init__(self, vocab=300, d=16, hidden=24, drop=0.):
        self.emb, self.rnn  = nn.Embedding(vocab, d), nn.LSTM(d, hidden, batch_first=True)
        self.key, self.tanh = nn.Linear(hidden, 16), nn.Tanh()
        self.score, self.fc, self.act = nn.Linear(16, 1), nn.Linear(hidden, 24), nn.Tanh()
        self.drop, self.head = nn.Dropout(drop), nn.Linear(24, 4)
    def forward(self, x):
        h = self.rnn(self.emb(x))[0]
        w = self.score(self.tanh(self.key(h))).softmax(1)
        return self.head(self.drop(self.act(self.fc((w * h).sum(1)))))

class AWD(Module):
    "fastai's AWD_LSTM with its decoder; every sequence starts anew."
    def __init__(self, vocab=20, d=32, hidden=48, layers=2, drop=.1, tied=True):
        self.rnn = AWD_LSTM(vocab, d, hidden, layers, 0, drop, drop, drop / 5, max(drop, .01))
        self.out = LinearDecoder(vocab, d, drop, self.rnn.encoder if tied else None)
    def forward(self, x):
        self.rnn.bs = len(x)
        self.rnn.reset()
        return self.out(self.rnn(x))[0].transpose(1, 2)

class Dilated(Module):
    "WaveNet's layer: a tanh of what was, times a gate, onto what goes on and beside it to the end."
    def __init__(self, d, dilation):
        self.pad = dilation
        self.new, self.tanh = nn.Conv1d(d, d, 2, dilation=dilation), nn.Tanh()
        self.let, self.gate = nn.Conv1d(d, d, 2, dilation=dilation), nn.Sigmoid()
        self.on = nn.Conv1d(d, d, 1)
    def forward(self, x):
        p = F.pad(x, (self.pad, 0))
        y = self.on(self.tanh(self.new(p)) * self.gate(self.let(p)))
        return x + y, y

class WaveNet(Module):
    def __init__(self, levels=16, d=16, depth=4):
        self.emb    = nn.Embedding(levels, d)
        self.layers = nn.ModuleList([Dilated(d, 2 ** i) for i in range(depth)])
        self.act1, self.mix, self.act2, self.head = nn.ReLU(), nn.Conv1d(d, d, 1), nn.ReLU(), nn.Conv1d(d, levels, 1)
        self.softmax = False
    def forward(self, x):
        x, s = self.emb(x).transpose(1, 2), 0
        for layer in self.layers:
            x, y = layer(x)
            s = s + y
        x = self.head(self.act2(self.mix(self.act1(s))))
        return x.softmax(1) if self.softmax else x

class Film(Module):
    "Every frame through convolutions, all of them through an LSTM."
    def __init__(self, c=8, hidden=32, cell='LSTM'):
        self.eye = nn.Sequential(*conv(1, c, 3), *conv(c, c, 3, 2), nn.Flatten(),
                                 nn.Linear(16 * c, 24), nn.ReLU())
        self.rnn, self.head = getattr(nn, cell)(24, hidden, batch_first=True), nn.Linear(hidden, 4)
    def forward(self, x):
        seen = self.eye(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])
        return self.head(self.rnn(seen)[0][:, -1])

class Pointer(Module):
    "A transformer decoder whose answers are places in what was read."
    def __init__(self, vocab=20, n=10, d=32, depth=1):
        self.n, self.emb, self.pos = n, nn.Embedding(vocab, d), nn.Parameter(.1 * torch.randn(n, d))
        enc = nn.TransformerEncoderLayer(d, 2, 2 * d, 0., batch_first=True, norm_first=True)
        dec = nn.TransformerDecoderLayer(d, 2, 2 * d, 0., batch_first=True, norm_first=True)
        self.enc = nn.TransformerEncoder(enc, depth, enable_nested_tensor=False)
        self.dec = nn.TransformerDecoder(dec, depth)
        self.query, self.key = nn.Linear(d, d), nn.Linear(d, d)
    def forward(self, x):
        x    = self.emb(x)
        read = self.enc(x[:, :self.n] + self.pos)
        said = self.dec(x[:, self.n:], read)
        return self.key(read) @ self.query(said).transpose(1, 2) / read.shape[2] ** .5

class Beat(Module):
    "Two convolutions over time beside the identity."
    def __init__(self, c, norm=True, skip=True):
        make = nn.BatchNorm1d if norm else (lambda c: nn.Identity())
        self.conv1, self.norm1, self.act1 = nn.Conv1d(c, c, 5, padding=2), make(c), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv1d(c, c, 5, padding=2), make(c), nn.ReLU()
        self.skip = skip
    def forward(self, x):
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(x + y if self.skip else y)

def series(c=12, blocks=3, norm=True, skip=True):
    stem = [nn.Conv1d(1, c, 7, 2, 3), nn.BatchNorm1d(c) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*stem, *[Beat(c, norm, skip) for _ in range(blocks)], nn.AdaptiveMaxPool1d(1), nn.Flatten(),
                         nn.Linear(c, 4))
