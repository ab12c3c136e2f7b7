"""The zoo's unseen half, on which no threshold was set: GoogLeNet, SqueezeNet, wide pre-activation ResNet, fastai's
XResNet, Perceiver, maxout, Siamese, two heads; coordinate nets (SIREN, Fourier features); deep & cross, mixture of
experts; fastai's AWD-LSTM, WaveNet, CNN + LSTM, pointer transformer, 1-d ResNet. Truths were written from what the
rules' names mean."""
from __future__ import annotations

from functools import partial

import torch
from fastai.callback.training import GradientClip
from fastai.optimizer import SGD, Adam
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from zoo_cases.kit import (InHalf, KeepGrads, Kit, Plus100, Smooth, Spike, Tiny, bigrams, case, cosine, images, kaiming,
                           normal, raw, scaled, warm_up, xavier)
from zoo_cases.nets import Lora
from zoo_cases.third_nets import dear, pretrained
from zoo_cases.unseen_nets import (AWD, Contrastive, DeepCross, Experts, Film, GaussNLL, GoogLeNet, Latents, Little,
                                   Pointer, Siamese, Supervised, Tasks, TwoHeads, WaveNet, both, clicks, couples, few,
                                   films, fourier, lookups, maxout, picture, pulses, regimes, reminders, series, siren,
                                   sound, squeezenet, wide, xres)

BCE, MSE = nn.BCEWithLogitsLoss, nn.MSELoss
Momentum = partial(SGD, mom=.9)
def dead(*layers):   [nn.init.constant_(m.bias, -10.) for m in layers]
def counts(x):       return torch.cat([x[:, :-4], 2000 + 1000 * x[:, -4:]], 1)

def fire(drop=0.):
    "SqueezeNet as torchvision initialises it: the last convolution is small."
    m = kaiming(squeezenet(drop=drop))
    nn.init.normal_(m[7].weight, std=.01)
    return m

def google(**kwargs):
    m = kaiming(GoogLeNet(**kwargs))
    nn.init.xavier_normal_(m.head.weight, .5)
    return m

# --- twins: images ---------------------------------------------------------------------------------------------------
@case('bad_init', 'starved', 'vanishing')
def incep_small_init(sick):
    m = google()
    if sick: normal(m, .01)
    return Kit(m, images(), lr=.03, opt=Momentum, iters=160)
@case('dead_units', 'bad_init')
def fire_bias_minus10(sick):
    m = fire()
    if sick: dead(*(c for c in m.modules() if isinstance(c, nn.Conv2d) and c.out_channels != 10))
    return Kit(m, images(), lr=.005, opt=Adam, iters=140)
@case('input_scale')
def fire_input_255(sick):
    return Kit(fire(), scaled(images(), raw) if sick else images(), lr=.05, opt=Momentum, iters=240)
@case('not_zeroed')
def fire_no_zero_grad(sick):
    return Kit(fire(), images(), lr=.05, opt=Momentum, iters=240, cbs=(KeepGrads(),) if sick else ())
@case('step_too_small')
def wrn_lr_1000th(sick):     return Kit(wide(), images(), lr=5e-5 if sick else .05, opt=Momentum)
@case('not_stepped', 'step_too_small')
def wrn_body_not_stepped(sick):
    m = wide()
    return Kit(m, images(), lr=.05, opt=Momentum, hidden=m[:3] if sick else None)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def xres_lr_100x(sick):      return Kit(xres(), images(), lr=1. if sick else .01, opt=Adam)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def perc_lr_100x(sick):
    return Kit(Latents(), images(), lr=1. if sick else .01, opt=Adam, bs=50, iters=200)
@case('double_softmax')
def perc_softmax_twice(sick):
    return Kit(Latents(softmax=sick), images(), lr=.01, opt=Adam, bs=50, iters=200)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def maxout_big_init(sick):   return Kit(kaiming(maxout(), 4. if sick else .6), images(True), lr=.05)
@case('fp16_underflow')
def maxout_fp16_underflow(sick):
    m = kaiming(maxout(), .6)
    return Kit(InHalf(m) if sick else m, images(True), bs=200, lr=.05 * 2 ** 18, loss=Tiny())
@case('input_scale')
def siam_input_255(sick):
    m = xavier(Siamese())
    return Kit(m, scaled(couples(), raw) if sick else couples(), lr=.02, loss=Contrastive(), iters=200)
@case('bad_init', 'starved', 'dead_units')
def siam_zero_init(sick):
    return Kit(normal(Siamese(), 0.) if sick else xavier(Siamese()), couples(), lr=.02, loss=Contrastive(), iters=200)
@case('step_too_small')
def siam_lr_1000th(sick):
    return Kit(xavier(Siamese()), couples(), lr=3e-6 if sick else .003, opt=Adam, loss=Contrastive(), iters=200)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def two_big_init(sick):
    return Kit(kaiming(TwoHeads(), 4. if sick else 1.), both(), lr=.02, opt=Momentum, loss=Tasks())
@case('not_stepped', 'step_too_small')
def two_body_not_stepped(sick):
    m = kaiming(TwoHeads())
    return Kit(m, both(), lr=.02, opt=Momentum, loss=Tasks(), hidden=m.body if sick else None)
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def two_lr_spike(sick):
    return Kit(kaiming(TwoHeads()), both(), lr=.1, loss=Tasks(), cbs=(Spike(60, 400.),) if sick else (), iters=200)
# --- twins: places, tables -------------------------------------------------------------------------------------------
@case('vanishing', 'starved', 'bad_init')
def coord_deep_sigmoid(sick):
    return Kit(xavier(fourier(depth=6, act=nn.Sigmoid if sick else nn.Tanh)), picture(), lr=.05, loss=MSE(), iters=200)
@case('fp16_underflow')
def coord_fp16_underflow(sick):
    m = kaiming(fourier())
    return Kit(InHalf(m) if sick else m, picture(), bs=200, lr=.05 * 2 ** 20, loss=Little(), iters=200)
@case('input_scale')
def dcn_counts(sick):
    return Kit(DeepCross(), scaled(clicks(), counts) if sick else clicks(), lr=.005, opt=Adam, loss=BCE(), iters=200)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def dcn_lr_300x(sick):
    return Kit(DeepCross(), clicks(), lr=1.5 if sick else .005, opt=Adam, loss=BCE(), iters=200)
@case('input_scale')
def moe_units(sick):
    return Kit(Experts(), scaled(regimes(), dear) if sick else regimes(), lr=.01, opt=Adam, loss=MSE(), iters=240)
# --- twins: sequences ------------------------------------------------------------------------------------------------
@case('step_too_small')
def awd_lr_1000th(sick):     return Kit(AWD(), bigrams(), lr=2e-5 if sick else .02, opt=Adam, iters=160)
@case('bad_init', 'starved', 'vanishing')
def awd_small_init(sick):
    m = AWD(tied=False)
    if sick: normal(m, .001)
    return Kit(m, bigrams(), lr=3., opt=Momentum, iters=200)
@case('step_too_small')
def wave_lr_1000th(sick):    return Kit(WaveNet(), sound(), lr=5e-6 if sick else .005, opt=Adam)
@case('saturated', 'bad_init', 'starved')
def wave_gates_shut(sick):
    m = WaveNet()
    if sick: dead(*(l.let for l in m.layers))
    return Kit(m, sound(), lr=.005, opt=Adam)
@case('double_softmax')
def wave_softmax_twice(sick): return Kit(WaveNet(softmax=sick), sound(), lr=.005, opt=Adam)
@case('not_zeroed')
def point_no_zero_grad(sick):
    return Kit(Pointer(), lookups(), lr=.005, opt=Adam, iters=200, cbs=(KeepGrads(),) if sick else ())
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def point_lr_100x(sick):     return Kit(Pointer(), lookups(), lr=.5 if sick else .005, opt=Adam, iters=200)
@case('vanishing', 'starved', 'bad_init')
def series_plain(sick):      return Kit(series(blocks=8, norm=not sick, skip=not sick), pulses(), lr=.1)
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def series_lr_spike(sick):
    return Kit(kaiming(series(norm=False), .5), pulses(), lr=.05, cbs=(Spike(60, 400.),) if sick else (), iters=200)

# --- twins: the fault sits in one layer ------------------------------------------------------------------------------
@case('dead_units', 'bad_init', guilty='stem.0', site='stem.1')
def incep_stem_dead(sick):
    m = google()
    if sick: dead(m.stem[0])
    return Kit(m, images(), lr=.03, opt=Momentum, iters=160)
@case('bad_init', 'dead_units', 'starved', guilty='3.squeeze', site='3.act1')
def fire_squeeze_zero(sick):
    m = fire()
    if sick: nn.init.zeros_(m[3].squeeze.weight)
    return Kit(m, images(), lr=.005, opt=Adam, iters=140)
@case('bad_init', 'exploding', 'step_too_large', guilty='7')
def wrn_head_big(sick):
    m = wide()
    if sick: m[7].weight.data.mul_(300.)
    return Kit(m, images(), lr=.05, opt=Momentum)
@case('not_stepped', 'step_too_small', guilty='11')
def xres_head_not_stepped(sick):
    m = xres(); nn.init.zeros_(m[11].weight)
    return Kit(m, images(), lr=.01, opt=Adam, hidden=m[11] if sick else None)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='2', site='3')
def maxout_one_big(sick):
    m = kaiming(maxout(), .6)
    if sick: m[2].weight.data.mul_(200.)
    return Kit(m, images(True), lr=.05)
@case('saturated', 'bad_init', guilty='net.2', site='net.3')
def siam_one_saturated(sick):
    m = xavier(Siamese(nn.Tanh))
    if sick: nn.init.constant_(m.net[2].bias, 10.)
    return Kit(m, couples(), lr=.02, loss=Contrastive(), iters=200)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='3', site='4')
def coord_one_big(sick):
    m = kaiming(fourier())
    if sick: m[3].weight.data.mul_(100.)
    return Kit(m, picture(), lr=.01, opt=Adam, loss=MSE(), iters=200)
@case('saturated', 'bad_init', guilty='5', site='6')
def coord_one_saturated(sick):
    m = xavier(fourier(act=nn.Tanh))
    if sick: nn.init.constant_(m[5].bias, 10.)
    return Kit(m, picture(), lr=.005, opt=Adam, loss=MSE(), iters=200)
@case('bad_init', 'dead_units', 'starved', guilty='3', site='4')
def coord_one_zero(sick):
    m = kaiming(fourier())
    if sick: nn.init.zeros_(m[3].weight)
    return Kit(m, picture(), lr=.05, loss=MSE(), iters=200)
@case('not_stepped', 'step_too_small', guilty='emb')
def dcn_emb_not_stepped(sick):
    m = DeepCross(); nn.init.normal_(m.emb.weight, std=.01)
    return Kit(m, clicks(), lr=.01, opt=Adam, loss=BCE(), iters=200, hidden=m.emb if sick else None)
@case('bad_init', 'exploding', 'step_too_large', guilty='up', site='act')
def moe_experts_big(sick):
    m = Experts()
    if sick: m.up.weight.data.mul_(1000.)
    return Kit(m, regimes(), lr=.01, opt=Adam, loss=MSE(), iters=240)
@case('dead_units', 'bad_init', guilty='mix', site='act2')
def wave_mix_dead(sick):
    m = WaveNet()
    if sick: dead(m.mix)
    return Kit(m, sound(), lr=.005, opt=Adam)
@case('dead_units', 'bad_init', guilty='eye.5', site='eye.6')
def film_eye_dead(sick):
    m = kaiming(Film())
    if sick: dead(m.eye[5])
    return Kit(m, films(), lr=.01, opt=Adam, bs=50, iters=300)
@case('vanishing_through_time', 'bad_init', 'saturated', guilty='rnn')
def film_forgets(sick):
    m = kaiming(Film())
    m.rnn.bias_ih_l0.data[32:64] = -6. if sick else 2.
    return Kit(m, reminders(), lr=.005, opt=Adam, bs=50, iters=160)
@case('not_stepped', 'step_too_small', guilty='emb')
def point_emb_not_stepped(sick):
    m = Pointer(); nn.init.normal_(m.emb.weight, std=.001)
    return Kit(m, lookups(), lr=.005, opt=Adam, iters=200, hidden=m.emb if sick else None)
@case('dead_units', 'bad_init', guilty='0', site='2')
def series_stem_dead(sick):
    m = kaiming(series(norm=False), .5)
    if sick: dead(m[0])
    return Kit(m, pulses(), lr=.05, iters=200)
@case('not_stepped', 'step_too_small', guilty='which')
def two_which_not_stepped(sick):
    m = kaiming(TwoHeads()); nn.init.zeros_(m.which.weight)
    return Kit(m, both(), lr=.05, opt=Momentum, loss=Tasks(.5), hidden=m.which if sick else None)

# --- healthy runs that fool naive rules ------------------------------------------------------------------------------
@case()
def incep_supervised(sick):
    return Kit(google(aux=True), images(), lr=.03, opt=Momentum, loss=Supervised(), iters=160)
@case()
def incep_tiny_batch(sick):  return Kit(google(), images(), lr=.002, opt=Adam, bs=4, iters=400)
@case()
def fire_smoothed(sick):
    return Kit(fire(), images(), lr=.005, opt=Adam, loss=Smooth(), iters=160)
@case()
def fire_dropout(sick):      return Kit(fire(.5), images(), lr=.005, opt=Adam, iters=200)
@case()
def wrn_zero_branches(sick):
    m = wide(); normal(m[1].conv2, 0.); normal(m[2].conv2, 0.)
    return Kit(m, images(), lr=.05, opt=Momentum)
@case()
def wrn_cosine(sick):        return Kit(wide(), images(), lr=.05, opt=Momentum, cbs=(cosine(.05),))
@case()
def wrn_adamw(sick):
    return Kit(wide(), images(), lr=.005, opt=partial(Adam, decouple_wd=True), wd=.1)
@case()
def xres_warm_up(sick):      return Kit(xres(), images(), lr=.02, opt=Adam, cbs=(warm_up(.02),))
@case()
def xres_rare_digits(sick):  return Kit(xres(), few(images()), lr=.005, opt=Adam)
@case()
def xres_frozen_body(sick):
    m = pretrained(xres); [l.requires_grad_(False) for l in [*m][:8]]
    return Kit(m, images(), lr=.02, opt=Adam)
@case()
def perc_plus_100(sick):     return Kit(Latents(), images(), lr=.01, opt=Adam, bs=50, iters=200, loss=Plus100())
@case()
def maxout_weight_norm(sick):
    m = kaiming(maxout(), .6)
    for i in (0, 2, 4): weight_norm(m[i])
    return Kit(m, images(True), lr=.05)
@case()
def maxout_lora(sick):
    m = pretrained(maxout, True)
    for i in (0, 2, 4): m[i] = Lora(m[i])
    return Kit(m, images(True), lr=.005, opt=Adam)
@case()
def siam_few_same(sick):
    return Kit(xavier(Siamese()), couples(.1), lr=.003, opt=Adam, loss=Contrastive(), iters=300)
@case()
def two_one_task(sick):      return Kit(kaiming(TwoHeads()), both(), lr=.02, opt=Momentum, loss=Tasks(0.))
@case()
def coord_siren(sick):       return Kit(siren(), picture(), lr=.002, opt=Adam, loss=MSE(), iters=240)
@case()
def coord_outliers(sick):
    return Kit(kaiming(fourier()), picture(.03), lr=.005, opt=Adam, loss=nn.SmoothL1Loss(), iters=200)
@case()
def coord_negative(sick):
    return Kit(fourier(n_out=2), picture(), lr=.005, opt=Adam, loss=GaussNLL(), iters=300)
@case()
def dcn_rare_words(sick):
    f = 1500, 400, 200, 8
    return Kit(DeepCross(f), clicks(f), lr=.005, opt=Adam, loss=BCE(), iters=240)
@case()
def dcn_few_clicks(sick):
    return Kit(DeepCross(), clicks(common=-2.), lr=.005, opt=Adam, loss=BCE(), iters=240)
@case()
def moe_one_asked(sick):     return Kit(Experts(8, top=1), regimes(), lr=.01, opt=Adam, loss=MSE(), iters=300)
@case()
def awd_dropout(sick):       return Kit(AWD(drop=.4), bigrams(), lr=.02, opt=Adam, iters=240)
@case()
def wave_adam_slow(sick):    return Kit(WaveNet(), sound(), lr=.001, opt=Adam, iters=240)
@case()
def film_gru_clipped(sick):
    return Kit(kaiming(Film(cell='GRU')), films(), lr=.01, opt=Adam, bs=50, iters=300, cbs=(GradientClip(.1),))
@case()
def point_converged(sick):   return Kit(Pointer(), lookups(), lr=.005, opt=Adam, iters=300)
@case()
def series_noisy_labels(sick): return Kit(series(), pulses(noise=.4), lr=.005, opt=Adam, iters=160)
