"A healthy setup of each architecture: those of the tuned half, on which thresholds were set, and of the unseen one."
from __future__ import annotations

from functools import partial

from fastai.optimizer import SGD, Adam
from torch import nn

from . import data as d
from .edits import Momentum
from .init import kaiming, xavier
from .losses import ELBO, BellsNLL, Contrastive, Played, Tasks
from .nets import dense, images, sequences as seqs
from .setups import Setup

BCE, MSE = nn.BCEWithLogitsLoss, nn.MSELoss
flat     = partial(d.images, True)

def gained(gain): return partial(kaiming, gain=gain)
def on(net, data, lr=.1, opt=SGD, **changes): return Setup(net, data, lr, opt).but(**changes)

TUNED = dict(
    mlp      = on(dense.mlp, flat, init=kaiming),
    tab      = on(dense.mlp, d.table, .02, loss=MSE, init=kaiming, n_in=12, n_out=1),
    cnn      = on(images.cnn, d.images, .2, init=kaiming),
    resnet   = on(images.resnet, d.images),
    rnn      = on(seqs.SigmoidRNN, d.rows, .2),
    lstm     = on(seqs.Recurrent, d.rows, .5, cell='LSTM'),
    tf       = on(seqs.Transformer, d.text, .005, Adam),
    # unseen once, then tuned on
    gru      = on(seqs.GRU, d.text, .01, Adam),
    vit      = on(images.ViT, d.images, .003, Adam),
    mixer    = on(images.Mixer, d.images, .004, Adam),
    tcn      = on(seqs.tcn, d.waves, .05, init=kaiming),
    auto     = on(dense.auto, d.pixels, 1., loss=MSE, init=xavier),
    mobile   = on(images.mobile, d.images, .2),
    vgg      = on(images.vgg, d.images),
    emb      = on(dense.Rows, d.categories, .01, Adam, init=kaiming),
    # the third part
    dense    = on(images.densenet, d.images, .2),
    unet     = on(images.UNet, d.masks, .05, bs=50, init=kaiming, c=6, norm=False),
    next     = on(images.ConvNext, d.images, .01, Adam),
    se       = on(images.senet, d.images, .2),
    vae      = on(dense.VAE, d.grey, .01, Adam, loss=ELBO, iters=200),
    text     = on(seqs.TextCNN, d.sentences, .005, Adam),
    tagger   = on(seqs.Tagger, d.tags, .01, Adam),
    seq      = on(seqs.Seq2Seq, d.reversals, .01, Adam, iters=200),
    glu      = on(seqs.GatedLM, d.text, .01, Adam),
    collab   = on(dense.collab, d.ratings, .05, Adam, loss=MSE, iters=200),
    fastab   = on(dense.Tabular, d.adult, .01, Adam),
    high     = on(dense.highway, flat, .3),
    graph    = on(dense.GraphNet, d.graphs, .2, init=kaiming),
    sets     = on(dense.sets, d.points, .1, init=kaiming),
    # the fourth part: made for mending
    effnet   = on(images.effnet, d.images, .01, Adam),
    shuffle  = on(images.shuffle, d.images, .2),
    bilinear = on(images.bilinear, d.images, .05, init=kaiming),
    nfnet    = on(images.NFNet, d.images, .5, iters=160),
    pooler   = on(images.Pooler, d.images, .01, Adam, iters=160),
    concat   = on(images.concat, d.images, .005, Adam),
    spectro  = on(images.spectro, d.spectrograms, .03, bs=50, iters=240, init=kaiming),
    ssm      = on(seqs.SSM, d.waves, iters=200),
    retnet   = on(seqs.RetNet, d.text, .005, Adam),
    attend   = on(seqs.Attend, d.sentences, .01, Adam, iters=160),
    ode      = on(dense.ODENet, flat),
    hyper    = on(dense.Hyper, d.tasks, .01, Adam, loss=MSE, iters=200),
    kan      = on(dense.kan, d.table, .05, loss=MSE, iters=200),
    dueling  = on(dense.Dueling, d.played, .03, loss=Played, iters=200, init=kaiming),
    ordinal  = on(dense.ordinal, d.levels, loss=BCE, init=kaiming),
    mdn      = on(dense.Mixture, d.arm, .01, Adam, loss=BellsNLL, iters=200),
    hashed   = on(dense.Hashed, d.clicks, .01, Adam, loss=BCE, iters=240))

UNSEEN = dict(
    incep    = on(images.google, d.images, .03, Momentum, iters=160),
    fire     = on(images.fire, d.images, .005, Adam, iters=140),
    wrn      = on(images.wide, d.images, .05, Momentum),
    xres     = on(images.xres, d.images, .01, Adam),
    perc     = on(images.Latents, d.images, .01, Adam, bs=50, iters=200),
    maxout   = on(dense.maxout, flat, .05, init=gained(.6)),
    siam     = on(dense.Siamese, d.couples, .02, loss=Contrastive, iters=200, init=xavier),
    two      = on(images.TwoHeads, d.both, .02, Momentum, loss=Tasks, init=kaiming),
    coord    = on(dense.fourier, d.picture, .05, loss=MSE, iters=200, init=kaiming),
    dcn      = on(dense.DeepCross, d.visits, .005, Adam, loss=BCE, iters=200),
    moe      = on(dense.Experts, d.regimes, .01, Adam, loss=MSE, iters=240),
    awd      = on(seqs.AWD, d.bigrams, .02, Adam, iters=160),
    wave     = on(seqs.WaveNet, d.sound, .005, Adam),
    film     = on(seqs.Film, d.films, .01, Adam, bs=50, iters=300, init=kaiming),
    point    = on(seqs.Pointer, d.lookups, .005, Adam, iters=200),
    series   = on(seqs.series, d.pulses, .05, iters=200, init=gained(.5), norm=False))
