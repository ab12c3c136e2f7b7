"""More of the zoo's tuned half, once unseen: DenseNet, U-Net, ConvNeXt, squeeze-and-excite, VAE; TextCNN, tagger,
seq2seq, gated language model; fastai's collaborative filtering and TabularModel, highway, graph net, deep sets."""
from __future__ import annotations

from functools import partial

from fastai.callback.training import GradientClip
from fastai.optimizer import Adam
from torch import nn
from zoo_cases.kit import (InHalf, KeepGrads, Kit, Plus100, Smooth, Spike, Tiny, bigrams, case, cosine, images, kaiming,
                           normal, raw, scaled, table, text, warm_up, xavier)
from zoo_cases.third_nets import (ConvNext, ELBO, GatedLM, GaussNLL, GraphNet, Seq2Seq, Tabular, Tagger, TextCNN, UNet,
                                  VAE, adult, collab, dear, densenet, graphs, grey, highway, masks, points, pretrained,
                                  ratings, reversals, senet, sentences, sets, tags)

MSE = nn.MSELoss
def millimetres(x):  return 3000 + 1000 * x

# --- twins: images ---------------------------------------------------------------------------------------------------
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def dense_lr_100x(sick):     return Kit(densenet(), images(), lr=20. if sick else .2)
@case('not_zeroed')
def dense_no_zero_grad(sick): return Kit(densenet(), images(), lr=1., cbs=(KeepGrads(),) if sick else ())
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def dense_big_init(sick):    return Kit(kaiming(densenet(norm=False), 3. if sick else 1.), images(), lr=.3, iters=240)
@case('input_scale')
def unet_input_255(sick):
    return Kit(kaiming(UNet(6, norm=False)), scaled(masks(), raw) if sick else masks(), bs=50, lr=.05)
@case('dead_units')
def unet_bias_minus10(sick):
    m = kaiming(UNet(6, norm=False))
    if sick: [nn.init.constant_(c.bias, -10.) for c in m.modules() if isinstance(c, nn.Conv2d)]
    return Kit(m, masks(), bs=50, lr=.05)
@case('double_softmax')
def unet_softmax_twice(sick): return Kit(UNet(softmax=sick), masks(), bs=50, lr=.1)
@case('step_too_small')
def next_lr_1000th(sick):    return Kit(ConvNext(), images(), lr=1e-5 if sick else .01, opt=Adam)
@case('not_stepped', 'step_too_small')
def next_body_not_stepped(sick):
    m = ConvNext()
    return Kit(m, images(), lr=.01, opt=Adam, hidden=nn.ModuleList([m.stem, m.blocks, m.norm]) if sick else None)
@case('not_stepped', 'step_too_small')
def se_body_not_stepped(sick):
    m = senet()
    return Kit(m, images(), lr=.2, hidden=m[:12] if sick else None)
@case('step_too_small')
def vae_lr_1000th(sick):     return Kit(VAE(), grey(), lr=1e-5 if sick else .01, opt=Adam, loss=ELBO(), iters=200)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def vae_big_init(sick):
    return Kit(kaiming(VAE(), 3. if sick else 1.), grey(), lr=.01, opt=Adam, loss=ELBO(), iters=200)
# --- twins: words ----------------------------------------------------------------------------------------------------
@case('double_softmax')
def text_softmax_twice(sick):
    return Kit(nn.Sequential(TextCNN(), *([nn.Softmax(1)] if sick else [])), sentences(), lr=.005, opt=Adam)
@case('dead_units')
def text_bias_minus10(sick):
    m = TextCNN()
    if sick: [nn.init.constant_(c.bias, -10.) for c in m.convs]
    return Kit(m, sentences(), lr=.005, opt=Adam)
@case('step_too_small')
def tagger_lr_1000th(sick):  return Kit(Tagger(), tags(), lr=1e-5 if sick else .01, opt=Adam)
@case('starved', 'bad_init', 'vanishing')
def tagger_small_init(sick): return Kit(normal(Tagger(), .001) if sick else Tagger(), tags(), lr=1.)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def seq_lr_100x(sick):       return Kit(Seq2Seq(), reversals(), lr=1. if sick else .01, opt=Adam, iters=200)
@case('not_zeroed')
def seq_no_zero_grad(sick):
    return Kit(Seq2Seq(), reversals(), lr=.01, opt=Adam, iters=200, cbs=(KeepGrads(),) if sick else ())
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def glu_lr_100x(sick):       return Kit(GatedLM(), text(), lr=1. if sick else .01, opt=Adam)
# --- twins: tables, graphs, sets -------------------------------------------------------------------------------------
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def collab_lr_100x(sick):    return Kit(collab(), ratings(), lr=2. if sick else .02, opt=Adam, loss=MSE(), iters=200)
@case('step_too_small')
def collab_lr_1000th(sick):  return Kit(collab(), ratings(), lr=5e-5 if sick else .05, opt=Adam, loss=MSE(), iters=200)
@case('bad_init')
def collab_zero_init(sick):
    m = collab()
    if sick: normal(m, 0.)
    return Kit(m, ratings(), lr=.05, opt=Adam, loss=MSE(), iters=300)
@case('step_too_small')
def fastab_lr_1000th(sick):  return Kit(Tabular(), adult(), lr=1e-5 if sick else .01, opt=Adam)
@case('not_zeroed')
def fastab_no_zero_grad(sick): return Kit(Tabular(), adult(), lr=.5, cbs=(KeepGrads(),) if sick else ())
@case('input_scale')
def high_unscaled(sick):
    return Kit(highway(4, n_in=12, n_out=1), scaled(table(), dear) if sick else table(), lr=.1, loss=MSE(), iters=200)
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def high_lr_spike(sick):     return Kit(highway(), images(True), lr=.3, cbs=(Spike(50, 300.),) if sick else ())
@case('vanishing', 'starved', 'bad_init')
def high_plain(sick):        return Kit(highway(16, gated=not sick), images(True), lr=.3)
@case('bad_init')
def high_zero_init(sick):    return Kit(normal(highway(), 0.) if sick else highway(), images(True), lr=.3)
@case('fp16_underflow')
def high_fp16_underflow(sick):
    m = highway()
    return Kit(InHalf(m) if sick else m, images(True), bs=200, lr=.2 * 2 ** 18, loss=Tiny(), iters=200)
@case('vanishing', 'starved', 'bad_init')
def graph_deep_sigmoid(sick):
    return Kit(xavier(GraphNet(depth=5, act=nn.Sigmoid if sick else nn.Tanh)), graphs(), lr=.2)
@case('double_softmax')
def graph_softmax_twice(sick): return Kit(GraphNet(softmax=sick), graphs(), lr=.01, opt=Adam)
@case('fp16_underflow')
def graph_fp16_underflow(sick):
    m = kaiming(GraphNet())
    return Kit(InHalf(m) if sick else m, graphs(), lr=.2 * 2 ** 18, loss=Tiny())
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def graph_lr_spike(sick):    return Kit(kaiming(GraphNet()), graphs(), lr=.2, cbs=(Spike(60, 300.),) if sick else ())
@case('input_scale')
def sets_unscaled(sick):
    return Kit(kaiming(sets()), scaled(points(), millimetres) if sick else points(), lr=.1)
@case('bad_init', 'starved', 'vanishing')
def sets_small_init(sick):   return Kit(normal(sets(), .01) if sick else kaiming(sets()), points(), lr=.1)
@case('saturated', 'bad_init')
def sets_tanh_saturated(sick):
    return Kit(xavier(sets(nn.Tanh, deep=4), 12. if sick else 1.), points(), lr=.01, opt=Adam)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def sets_lr_100x(sick):      return Kit(kaiming(sets()), points(), lr=.5 if sick else .005, opt=Adam)

# --- twins: the fault sits in one layer ------------------------------------------------------------------------------
@case('dead_units', guilty='1', site='2')
def dense_stem_dead(sick):
    m = densenet()
    if sick: nn.init.constant_(m[1].bias, -10.)
    return Kit(m, images(), lr=.2)
@case('dead_units', guilty='up1.2', site='up1.3')
def unet_last_dead(sick):
    m = kaiming(UNet(6, norm=False))
    if sick: nn.init.constant_(m.up1[2].bias, -10.)
    return Kit(m, masks(), bs=50, lr=.05)
@case('dead_units', guilty='4', site='5')
def sets_one_dead(sick):
    m = kaiming(sets())
    if sick: nn.init.constant_(m[4].bias, -10.)
    return Kit(m, points(), lr=.1)
@case('bad_init', guilty='convs.1', site='acts.1')
def graph_one_zero(sick):
    m = kaiming(GraphNet())
    if sick: nn.init.zeros_(m.convs[1].weight)
    return Kit(m, graphs(), lr=.2)
@case('bad_init', guilty='fc', site='act2')
def text_one_zero(sick):
    m = kaiming(TextCNN())
    if sick: nn.init.zeros_(m.fc.weight)
    return Kit(m, sentences(), lr=.005, opt=Adam)
@case('bad_init', guilty='model.layers.0.0', site='model.layers.0.1')
def fastab_one_zero(sick):
    m = Tabular()
    if sick: nn.init.zeros_(m.model.layers[0][0].weight)
    return Kit(m, adult(), lr=.01, opt=Adam)
@case('saturated', 'bad_init', guilty='2', site='3')
def sets_one_saturated(sick):
    m = xavier(sets(nn.Tanh))
    if sick: nn.init.constant_(m[2].bias, 10.)
    return Kit(m, points(), lr=.005, opt=Adam)
@case('saturated', 'bad_init', guilty='mix', site='act')
def seq_mix_saturated(sick):
    m = Seq2Seq()
    if sick: nn.init.constant_(m.mix.bias, 10.)
    return Kit(m, reversals(), lr=.01, opt=Adam, iters=200)
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def glu_head_big(sick):
    m = GatedLM()
    if sick: m.head.weight.data.mul_(300.)
    return Kit(m, text(), lr=.01, opt=Adam)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='enc2')
def vae_code_big(sick):
    m = VAE()
    if sick: m.enc2.weight.data.mul_(100.)
    return Kit(m, grey(), lr=.01, opt=Adam, loss=ELBO(), iters=200)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='convs.1', site='acts.1')
def graph_one_big(sick):
    m = kaiming(GraphNet())
    if sick: m.convs[1].weight.data.mul_(100.)
    return Kit(m, graphs(), lr=.1)
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def next_head_big(sick):
    m = ConvNext()
    if sick: m.head.weight.data.mul_(300.)
    return Kit(m, images(), lr=.01, opt=Adam)
@case('not_stepped', 'step_too_small', guilty='14')
def se_head_not_stepped(sick):
    m = senet(); nn.init.zeros_(m[14].weight)
    return Kit(m, images(), lr=.5, hidden=m[14] if sick else None)
@case('not_stepped', 'step_too_small', guilty='i_weight')
def collab_items_not_stepped(sick):
    m = collab()
    return Kit(m, ratings(), lr=.05, opt=Adam, loss=MSE(), iters=200, hidden=m.i_weight if sick else None)
@case('not_stepped', 'step_too_small', guilty='emb')
def text_emb_not_stepped(sick):
    m = TextCNN(); nn.init.normal_(m.emb.weight, std=.01)
    return Kit(m, sentences(), lr=.005, opt=Adam, hidden=m.emb if sick else None)

# --- healthy runs that fool naive rules ------------------------------------------------------------------------------
@case()
def dense_plus_100(sick):    return Kit(densenet(), images(), lr=.5, loss=Plus100())
@case()
def dense_zero_head(sick):
    m = densenet(); normal(m[-1], 0.)
    return Kit(m, images(), lr=.5)
@case()
def dense_fine_tuned(sick):  return Kit(pretrained(densenet), images(), lr=.05)
@case()
def se_frozen_body(sick):
    m = pretrained(senet); m[:12].requires_grad_(False)
    return Kit(m, images(), lr=.5)
@case()
def se_adamw(sick):
    return Kit(senet(), images(), lr=.005, opt=partial(Adam, decouple_wd=True), wd=.1, iters=200)
@case()
def se_silu_dropout(sick):   return Kit(senet(act=nn.SiLU, drop=.5), images(), lr=.2)
@case()
def unet_cosine(sick):       return Kit(UNet(), masks(), bs=50, lr=.3, cbs=(cosine(.3),), iters=160)
@case()
def unet_rare_ink(sick):     return Kit(UNet(), masks(2.5), bs=50, lr=.01, opt=Adam, iters=160)
@case()
def next_zero_gamma(sick):   return Kit(ConvNext(gamma=1e-6), images(), lr=.01, opt=Adam)
@case()
def next_warm_up(sick):      return Kit(ConvNext(), images(), lr=.01, opt=Adam, cbs=(warm_up(.01),))
@case()
def vae_adam(sick):          return Kit(VAE(), grey(), lr=.005, opt=Adam, loss=ELBO(), iters=300)
@case()
def text_smoothed(sick):     return Kit(TextCNN(), sentences(), lr=.01, opt=Adam, loss=Smooth(), iters=300)
@case()
def text_dropout(sick):      return Kit(TextCNN(drop=.5), sentences(), lr=.005, opt=Adam)
@case()
def text_rare_words(sick):
    return Kit(TextCNN(3000), sentences(vocab=3000), lr=.005, opt=Adam)
@case()
def tagger_clipped(sick):    return Kit(Tagger(), tags(), lr=2., cbs=(GradientClip(.2),))
@case()
def tagger_noisy_tags(sick): return Kit(Tagger(), tags(noise=.4), lr=.01, opt=Adam, iters=200)
@case()
def seq_converged(sick):     return Kit(Seq2Seq(), reversals(), lr=.01, opt=Adam, iters=400)
@case()
def glu_bigram(sick):        return Kit(GatedLM(20), bigrams(), lr=.01, opt=Adam, iters=200)
@case()
def collab_noise(sick):      return Kit(collab(), ratings(noise=1.), lr=.02, opt=Adam, loss=MSE(), iters=200, wd=.1)
@case()
def collab_rare(sick):
    return Kit(collab(1200, 50), ratings(1200, 50), lr=.05, opt=Adam, loss=MSE(), iters=400)
@case()
def fastab_weight_decay(sick): return Kit(Tabular(), adult(), lr=.01, opt=Adam, wd=.1, iters=200)
@case()
def fastab_negative(sick):
    return Kit(Tabular(n_out=2), adult(number=True), lr=.01, opt=Adam, loss=GaussNLL(), iters=200)
@case()
def high_carried(sick):      return Kit(highway(12, bias=-4.), images(True), lr=.2)
@case()
def high_adam_deep(sick):    return Kit(highway(12), images(True), lr=.003, opt=Adam)
@case()
def graph_noisy_labels(sick): return Kit(kaiming(GraphNet()), graphs(noise=.4), lr=.01, opt=Adam, iters=200)
@case()
def sets_tiny_batch(sick):   return Kit(kaiming(sets()), points(), lr=.002, opt=Adam, bs=4, iters=400)
@case()
def sets_gelu(sick):         return Kit(sets(nn.GELU), points(), lr=.005, opt=Adam)
