"""More of the zoo's tuned half: nets like EfficientNet, ShuffleNet, NFNet, PoolFormer, a bilinear CNN, vision_learner's
head (both poolings), a CNN on spectrograms; a state-space model, retention, an LSTM with attention; a neural ODE,
hypernetwork, KAN, dueling value net, ordinal regression, mixture density net, hashed embeddings."""
from __future__ import annotations

from functools import partial

from fastai.callback.training import GradientClip
from fastai.optimizer import Adam, RMSProp
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from zoo_cases.fourth_nets import (SSM, Attend, BellsNLL, Dueling, Hashed, Hyper, Mixture, NFNet, ODENet, Played,
                                   Pooler, RetNet, Small, arm, bilinear, clicks, concat, effnet, first, kan, levels,
                                   ordinal, played, shuffle, spectro, spectrograms, tasks)
from zoo_cases.kit import (InHalf, KeepGrads, Kit, Plus100, Smooth, Spike, bigrams, case, cosine, images, kaiming,
                           normal, raw, scaled, table, text, warm_up, waves, xavier)
from zoo_cases.third_nets import sentences
from zoo_cases.third_nets import pretrained
from zoo_cases.tuned_third import millimetres

MSE, BCE = nn.MSELoss, nn.BCEWithLogitsLoss

# --- twins: images ---------------------------------------------------------------------------------------------------
@case('step_too_small')
def effnet_lr_1000th(sick):  return Kit(effnet(), images(), lr=1e-5 if sick else .01, opt=Adam)
@case('double_softmax')
def effnet_softmax_twice(sick):
    return Kit(nn.Sequential(effnet(), *([nn.Softmax(1)] if sick else [])), images(), lr=.2)
@case('not_zeroed')
def shuffle_no_zero_grad(sick): return Kit(shuffle(), images(), lr=1., cbs=(KeepGrads(),) if sick else ())
@case('dead_units')
def bilinear_bias_minus10(sick):
    m = kaiming(bilinear())
    if sick: [nn.init.constant_(c.bias, -10.) for c in m if isinstance(c, nn.Conv2d)]
    return Kit(m, images(), lr=.05)
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def bilinear_lr_spike(sick): return Kit(kaiming(bilinear()), images(), lr=.05, cbs=(Spike(60, 300.),) if sick else ())
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def nfnet_big_gain(sick):    return Kit(NFNet(depth=4, gain=9. if sick else 1.7, alpha=1.), images(), lr=.02, iters=160)
@case('input_scale')
def nfnet_input_255(sick):   return Kit(NFNet(), scaled(images(), raw) if sick else images(), lr=.5, iters=160)
@case('not_stepped', 'step_too_small')
def pooler_body_not_stepped(sick):
    m = Pooler()
    body = nn.ModuleList([m.patch, m.blocks, m.norm])
    return Kit(m, images(), lr=.01, opt=Adam, iters=160, hidden=body if sick else None)
@case('step_too_large', 'exploding', 'non_finite', 'unstable', 'dead_units')
def concat_lr_1000x(sick):   return Kit(concat(), images(), lr=5. if sick else .005, opt=Adam)
@case('input_scale')
def spectro_energy(sick):
    return Kit(kaiming(spectro()), spectrograms(not sick), bs=50, lr=.03, iters=240)
@case('vanishing', 'starved', 'bad_init')
def spectro_deep_plain(sick):
    return Kit(spectro((8,) * 10, norm=not sick), spectrograms(), bs=50, lr=.1, iters=160)
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def spectro_lr_spike(sick):
    return Kit(kaiming(spectro()), spectrograms(), bs=50, lr=.03, iters=240, cbs=(Spike(80, 300.),) if sick else ())
# --- twins: sequences ------------------------------------------------------------------------------------------------
@case('vanishing_through_time', 'vanishing', 'bad_init', 'starved', 'not_learning')
def ssm_forgets(sick):
    return Kit(SSM(n_out=4, decay=2. if sick else .02, last=True), first(), lr=.005, opt=Adam, iters=160)
@case('step_too_small')
def ssm_lr_1000th(sick):     return Kit(SSM(), waves(), lr=1e-4 if sick else .1, iters=200)
@case('double_softmax')
def retnet_softmax_twice(sick):
    return Kit(nn.Sequential(RetNet(), *([nn.Softmax(1)] if sick else [])), text(), lr=.005, opt=Adam)
@case('not_zeroed')
def attend_no_zero_grad(sick):
    return Kit(Attend(), sentences(), lr=.01, opt=Adam, iters=160, cbs=(KeepGrads(),) if sick else ())
# --- twins: tables ---------------------------------------------------------------------------------------------------
@case('exploding', 'bad_init', 'non_finite', 'step_too_large', 'unstable')
def ode_long_time(sick):     return Kit(kaiming(ODENet(act=nn.ReLU, time=12. if sick else 1.)), images(True), lr=.1)
@case('bad_init', 'saturated', 'exploding', 'step_too_large')
def ode_tanh_saturated(sick): return Kit(xavier(ODENet(), 12. if sick else 1.), images(True), lr=.1)
@case('bad_init', 'dead_units', 'starved')
def hyper_zero_init(sick):
    m = Hyper()
    return Kit(normal(m, 0.) if sick else m, tasks(), lr=.01, opt=Adam, loss=MSE(), iters=200)
@case('input_scale')
def kan_unscaled(sick):
    return Kit(kan(), scaled(table(), millimetres) if sick else table(), lr=.05, loss=MSE(), iters=200)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def dueling_lr_100x(sick):   return Kit(kaiming(Dueling()), played(), lr=3. if sick else .03, loss=Played(), iters=200)
@case('vanishing', 'starved', 'bad_init')
def ordinal_deep_sigmoid(sick):
    return Kit(xavier(ordinal(6, nn.Sigmoid if sick else nn.Tanh)), levels(), lr=.1, loss=BCE(), iters=200)
@case('bad_init', 'starved', 'vanishing')
def ordinal_small_init(sick):
    m = ordinal(4)
    return Kit(normal(m, .01) if sick else kaiming(m), levels(), lr=.1, loss=BCE(), iters=200)
@case('fp16_underflow')
def ordinal_fp16_underflow(sick):
    m = kaiming(ordinal())
    return Kit(InHalf(m) if sick else m, levels(), lr=.2 * 2 ** 18, loss=Small(BCE()))
@case('fp16_underflow')
def dueling_fp16_underflow(sick):
    m = kaiming(Dueling())
    return Kit(InHalf(m) if sick else m, played(), lr=.015 * 2 ** 22, loss=Small(Played(), 22), iters=240)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def mdn_lr_100x(sick):       return Kit(Mixture(), arm(), lr=1. if sick else .01, opt=Adam, loss=BellsNLL(), iters=200)
@case('bad_init')
def hashed_zero_init(sick):
    m = Hashed()
    return Kit(normal(m, 0.) if sick else m, clicks(), lr=.01, opt=Adam, loss=BCE(), iters=240)

# --- twins: the fault sits in one layer ------------------------------------------------------------------------------
@case('saturated', 'starved', 'bad_init', 'dead_units', guilty='4.more', site='4.gate')
def effnet_gate_shut(sick):
    m = kaiming(effnet(norm=False))
    if sick: nn.init.constant_(m[4].more.bias, -12.)
    return Kit(m, images(), lr=.5, iters=160)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='6', site='8')
def effnet_top_big(sick):
    m = kaiming(effnet(norm=False))
    if sick: m[6].weight.data.mul_(300.)
    return Kit(m, images(), lr=.5, iters=160)
@case('dead_units', guilty='1', site='2')
def shuffle_stem_dead(sick):
    m = shuffle()
    if sick: nn.init.constant_(m[1].bias, -10.)
    return Kit(m, images(), lr=.2)
@case('dead_units', guilty='4', site='5')
def bilinear_last_dead(sick):
    m = kaiming(bilinear())
    if sick: nn.init.constant_(m[4].bias, -10.)
    return Kit(m, images(), lr=.05)
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def pooler_head_big(sick):
    m = Pooler()
    if sick: m.head.weight.data.mul_(1000.)
    return Kit(m, images(), lr=.01, opt=Adam, iters=160)
@case('dead_units', guilty='0.7', site='0.8')
def concat_body_dead(sick):
    m = concat()
    if sick: nn.init.constant_(m[0][7].bias, -10.)
    return Kit(m, images(), lr=.01, opt=Adam)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='ssms.0', site='acts.0')
def ssm_one_big(sick):
    m = SSM()
    if sick: m.ssms[0].c.data.mul_(1000.)
    return Kit(m, waves(), lr=.1, iters=200)
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def retnet_head_big(sick):
    m = RetNet()
    if sick: m.head.weight.data.mul_(300.)
    return Kit(m, text(), lr=.005, opt=Adam)
@case('saturated', 'bad_init', guilty='fc', site='act')
def attend_fc_saturated(sick):
    m = Attend()
    if sick: nn.init.constant_(m.fc.bias, 10.)
    return Kit(m, sentences(), lr=.01, opt=Adam, iters=160)
@case('not_stepped', 'step_too_small', guilty='emb')
def attend_emb_not_stepped(sick):
    m = Attend(); nn.init.normal_(m.emb.weight, std=.05)
    return Kit(m, sentences(), lr=.01, opt=Adam, iters=160, hidden=m.emb if sick else None)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='make')
def hyper_make_big(sick):
    m = kaiming(Hyper(), .7)
    if sick: m.make.weight.data.mul_(100.)
    return Kit(m, tasks(), lr=.01, opt=Adam, loss=MSE(), iters=200)
@case('dead_units', guilty='fc', site='act1')
def hyper_fc_dead(sick):
    m = kaiming(Hyper(), .7)
    if sick: nn.init.constant_(m.fc.bias, -10.)
    return Kit(m, tasks(), lr=.01, opt=Adam, loss=MSE(), iters=200)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='1.bumps')
def kan_bumps_big(sick):
    m = kan()
    if sick: m[1].bumps.weight.data.mul_(300.)
    return Kit(m, table(), lr=.05, loss=MSE(), iters=200)
@case('dead_units', guilty='body.2', site='body.3')
def dueling_body_dead(sick):
    m = kaiming(Dueling())
    if sick: nn.init.constant_(m.body[2].bias, -10.)
    return Kit(m, played(), lr=.03, loss=Played(), iters=200)
@case('bad_init', 'dead_units', 'starved', guilty='2', site='3')
def ordinal_one_zero(sick):
    m = kaiming(ordinal())
    if sick: nn.init.zeros_(m[2].weight)
    return Kit(m, levels(), lr=.1, loss=BCE(), iters=200)
@case('saturated', 'bad_init', guilty='body.2', site='body.3')
def mdn_one_saturated(sick):
    m = Mixture()
    if sick: nn.init.constant_(m.body[2].bias, 12.)
    return Kit(m, arm(), lr=.01, opt=Adam, loss=BellsNLL(), iters=240)
@case('not_stepped', 'step_too_small', guilty='items')
def hashed_items_not_stepped(sick):
    m = Hashed(std=.1)
    return Kit(m, clicks(), lr=.01, opt=Adam, loss=BCE(), iters=240, hidden=m.items if sick else None)

# --- healthy runs that fool naive rules ------------------------------------------------------------------------------
@case()
def effnet_frozen_body(sick):
    m = pretrained(effnet); m[:6].requires_grad_(False)
    return Kit(m, images(), lr=.01, opt=Adam, iters=200)
@case()
def effnet_dropout(sick):    return Kit(effnet(drop=.5), images(), lr=.01, opt=Adam, iters=200)
@case()
def shuffle_rmsprop(sick):   return Kit(shuffle(), images(), lr=.003, opt=RMSProp)
@case()
def shuffle_cosine_tail(sick): return Kit(shuffle(), images(), lr=.5, cbs=(cosine(.5),), iters=200)
@case()
def bilinear_plus_100(sick): return Kit(kaiming(bilinear()), images(), lr=.05, loss=Plus100(), iters=200)
@case()
def nfnet_zero_skip(sick):
    return Kit(NFNet(depth=4, skip=0.), images(), lr=.01, opt=Adam, cbs=(warm_up(.01),), iters=160)
@case()
def nfnet_clipped(sick):     return Kit(NFNet(act=nn.GELU), images(), lr=.5, cbs=(GradientClip(.3),), iters=160)
@case()
def pooler_small_scale(sick): return Kit(Pooler(scale=1e-5), images(), lr=.01, opt=Adam, iters=160)
@case()
def pooler_smoothed(sick):   return Kit(Pooler(), images(), lr=.005, opt=Adam, loss=Smooth(), iters=200)
@case()
def concat_much_dropout(sick): return Kit(concat(ps=.5), images(), lr=.005, opt=Adam, iters=200)
@case()
def concat_fine_tuned(sick):
    m = pretrained(concat); m[0].requires_grad_(False)
    return Kit(m, images(), lr=.005, opt=Adam, iters=200)
@case()
def spectro_leaky(sick):
    return Kit(spectro(act=partial(nn.LeakyReLU, .2), norm=True), spectrograms(), bs=50, lr=.003, opt=Adam, iters=200)
@case()
def ssm_tiny_batch(sick):    return Kit(SSM(), waves(), lr=.003, opt=Adam, bs=5, iters=300)
@case()
def retnet_bigram(sick):     return Kit(RetNet(20), bigrams(), lr=.005, opt=Adam, iters=160)
@case()
def retnet_tied(sick):       return Kit(RetNet(tied=True), text(), lr=.005, opt=Adam, cbs=(warm_up(.005),), iters=160)
@case()
def attend_rare_words(sick): return Kit(Attend(2000), sentences(vocab=2000), lr=.01, opt=Adam, iters=240)
@case()
def ode_many_steps(sick):    return Kit(ODENet(steps=24), images(True), lr=.01, opt=Adam)
@case()
def hyper_unused(sick):
    m = Hyper(act=nn.Tanh, width=48); m.spare = nn.Linear(48, 48)
    return Kit(m, tasks(noise=.5), lr=.01, opt=Adam, loss=MSE(), iters=240)
@case()
def kan_low_lr(sick):        return Kit(kan((12, 24, 1)), table(), lr=.001, opt=Adam, loss=MSE(), iters=300)
@case()
def dueling_outliers(sick):
    return Kit(Dueling(), played(outliers=.02), lr=.003, opt=Adam, loss=Played(huber=True), iters=240)
@case()
def ordinal_rare(sick):      return Kit(ordinal(norm=True), levels(rare=True), lr=.01, opt=Adam, loss=BCE(), iters=160)
@case()
def ordinal_weight_norm(sick):
    m = kaiming(ordinal())
    for i in (0, 2, 4): weight_norm(m[i])
    return Kit(m, levels(), lr=.1, loss=BCE(), iters=240)
@case()
def mdn_negative(sick):      return Kit(Mixture(k=10), arm(.01), lr=.01, opt=Adam, loss=BellsNLL(), iters=300)
@case()
def hashed_noisy_clicks(sick): return Kit(Hashed(), clicks(flip=.2), lr=.01, opt=Adam, loss=BCE(), iters=300, wd=.01)
