"More of the zoo's tuned half: GRU, ViT, mixer, TCN, autoencoder, MobileNet, VGG, an embedding, once unseen."
from __future__ import annotations

from functools import partial

from fastai.callback.training import GradientClip
from fastai.optimizer import Adam
from torch import nn
from zoo_cases.kit import (InHalf, KeepGrads, Kit, Plus100, Smooth, Spike, Tiny, case, categories, cosine, images,
                           itself, kaiming, normal, raw, scaled, text, warm_up, waves, xavier)
from zoo_cases.nets import DEEP, GRU, Lora, Mixer, Rows, Separable, ViT, auto, mobile, tcn, vgg

MSE = nn.MSELoss
def pixels(noise=0.): return itself(images(True), noise)
def shifted(x):       return 500 + 100 * x
def coarse(x):        return x * x.new_tensor([1.] + [1000.] * 6)     # the category stays, the numbers are not scaled

# --- twins: sick and healthy differ by one line ----------------------------------------------------------------------
@case('step_too_small')
def gru_lr_1000th(sick):     return Kit(GRU(), text(), lr=1e-5 if sick else .01, opt=Adam)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def gru_lr_100x(sick):       return Kit(GRU(), text(), lr=1. if sick else .01, opt=Adam)
@case('double_softmax')
def gru_softmax_twice(sick): return Kit(GRU(softmax=sick), text(), lr=.01, opt=Adam)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def vit_lr_100x(sick):       return Kit(ViT(), images(), lr=.3 if sick else .003, opt=Adam)
@case('step_too_small')
def vit_lr_1000th(sick):     return Kit(ViT(), images(), lr=3e-6 if sick else .003, opt=Adam)
@case('not_stepped', 'step_too_small')
def vit_body_not_stepped(sick):
    m = ViT()
    return Kit(m, images(), lr=.003, opt=Adam, hidden=nn.ModuleList([m.patch, m.blocks, m.norm]) if sick else None)
@case('bad_init')
def mixer_zero_init(sick):   return Kit(normal(Mixer(), 0.) if sick else Mixer(), images(), lr=.1)
@case('not_zeroed')
def mixer_no_zero_grad(sick): return Kit(Mixer(), images(), lr=.3, cbs=(KeepGrads(),) if sick else ())
@case('fp16_underflow')
def mixer_fp16_underflow(sick):
    m = Mixer()
    return Kit(InHalf(m) if sick else m, images(), lr=.1 * 2 ** 18, loss=Tiny())
@case('input_scale')
def tcn_unscaled(sick):      return Kit(kaiming(tcn()), scaled(waves(), shifted) if sick else waves(), lr=.05)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def tcn_big_init(sick):
    m = kaiming(tcn(8))
    if sick: [c.weight.data.mul_(3.) for c in m if isinstance(c, nn.Conv1d)]
    return Kit(m, waves(), lr=.05)
@case('dead_units')
def tcn_bias_minus10(sick):
    m = kaiming(tcn())
    if sick: [nn.init.constant_(c.bias, -10.) for c in m if isinstance(c, nn.Conv1d)]
    return Kit(m, waves(), lr=.05)
@case('step_too_small')
def tcn_lr_1000th(sick):     return Kit(kaiming(tcn()), waves(), lr=5e-5 if sick else .05)
@case('bad_init', 'starved', 'vanishing')
def auto_small_init(sick):
    m = auto(nn.Tanh, DEEP)
    return Kit(normal(m, .01) if sick else xavier(m), pixels(), lr=1., loss=MSE())
@case('vanishing', 'starved', 'bad_init')
def auto_deep_sigmoid(sick):
    return Kit(xavier(auto(nn.Sigmoid if sick else nn.Tanh, DEEP)), pixels(), lr=1., loss=MSE())
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def auto_lr_100x(sick):      return Kit(xavier(auto()), pixels(), lr=.3 if sick else .003, opt=Adam, loss=MSE())
@case('saturated', 'bad_init')
def auto_tanh_saturated(sick): return Kit(xavier(auto(nn.Tanh, DEEP), 12. if sick else 1.), pixels(), lr=1., loss=MSE())
@case('not_zeroed')
def mobile_no_zero_grad(sick): return Kit(mobile(), images(), lr=1., cbs=(KeepGrads(),) if sick else ())
@case('double_softmax')
def mobile_softmax_twice(sick):
    return Kit(nn.Sequential(mobile(), *([nn.Softmax(1)] if sick else [])), images(), lr=.2)
@case('not_stepped', 'step_too_small')
def mobile_body_not_stepped(sick):
    m = mobile()
    return Kit(m, images(), lr=.2, hidden=m[:6] if sick else None)
@case('vanishing', 'starved', 'bad_init')
def vgg_deep_plain(sick):    return Kit(vgg(((8, 2), (8, 18)), norm=not sick), images(), lr=.05)
@case('input_scale')
def vgg_input_255(sick):     return Kit(kaiming(vgg(norm=False)), scaled(images(), raw) if sick else images(), lr=.05)
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def vgg_lr_100x(sick):       return Kit(vgg(), images(), lr=10. if sick else .1)
@case('step_too_large', 'dead_units', 'exploding', 'non_finite')
def vgg_lr_spike(sick):
    return Kit(kaiming(vgg(norm=False)), images(), lr=.05, cbs=(Spike(50, 300.),) if sick else ())
@case('input_scale')
def emb_unscaled(sick):      return Kit(kaiming(Rows()), scaled(categories(), coarse) if sick else categories(), lr=.2)
@case('step_too_small')
def emb_lr_1000th(sick):     return Kit(kaiming(Rows()), categories(), lr=1e-5 if sick else .01, opt=Adam)

# --- twins: the fault sits in one layer ------------------------------------------------------------------------------
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def gru_head_big(sick):
    m = GRU()
    if sick: m.head.weight.data.mul_(300.)
    return Kit(m, text(), lr=.01, opt=Adam)
@case('not_stepped', 'step_too_small', guilty='head')
def vit_head_not_stepped(sick):
    m = ViT(); nn.init.zeros_(m.head.weight)
    return Kit(m, images(), lr=.003, opt=Adam, hidden=m.head if sick else None)
@case('dead_units', guilty='4', site='5')
def tcn_one_dead(sick):
    m = kaiming(tcn())
    if sick: nn.init.constant_(m[4].bias, -10.)
    return Kit(m, waves(), lr=.05)
@case('bad_init', guilty='6', site='7')
def tcn_one_zero(sick):
    m = kaiming(tcn())
    if sick: nn.init.zeros_(m[6].weight)
    return Kit(m, waves(), lr=.05)
@case('saturated', 'bad_init', guilty='2', site='3')
def auto_neck_saturated(sick):
    m = xavier(auto(nn.Tanh))
    if sick: nn.init.constant_(m[2].bias, 10.)
    return Kit(m, pixels(), lr=1., loss=MSE())
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='4', site='5')
def auto_one_big(sick):
    m = xavier(auto())
    if sick: m[4].weight.data.mul_(100.)
    return Kit(m, pixels(), lr=2., loss=MSE())
@case('dead_units', guilty='4.norm2', site='4.act2')
def mobile_one_dead(sick):
    m = mobile()
    if sick: nn.init.constant_(m[4].norm2.bias, -10.)
    return Kit(m, images(), lr=.2)
@case('bad_init', guilty='2', site='3')
def vgg_one_zero(sick):
    m = kaiming(vgg(norm=False))
    if sick: nn.init.zeros_(m[2].weight)
    return Kit(m, images(), lr=.05)
@case('dead_units', guilty='7', site='8')
def vgg_one_dead(sick):
    m = kaiming(vgg(norm=False))
    if sick: nn.init.constant_(m[7].bias, -20.)
    return Kit(m, images(), lr=.05)
@case('not_stepped', 'step_too_small', guilty='emb')
def emb_not_stepped(sick):
    m = kaiming(Rows()); nn.init.normal_(m.emb.weight, std=.01)
    return Kit(m, categories(), lr=.01, opt=Adam, hidden=m.emb if sick else None)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='body.2', site='body.3')
def emb_one_big(sick):
    m = kaiming(Rows())
    if sick: m.body[2].weight.data.mul_(100.)
    return Kit(m, categories(), lr=.1)

# --- healthy runs that fool naive rules ------------------------------------------------------------------------------
@case()
def gru_warm_up(sick):       return Kit(GRU(), text(), lr=.01, opt=Adam, cbs=(warm_up(.01),))
@case()
def gru_clipped(sick):       return Kit(GRU(), text(), lr=2., cbs=(GradientClip(.2),))
@case()
def vit_zero_head(sick):
    m = ViT(); nn.init.zeros_(m.head.weight)
    return Kit(m, images(), lr=.003, opt=Adam)
@case()
def mixer_lora(sick):
    m = Mixer()
    for b in m.blocks: b.up2, b.down2 = Lora(b.up2), Lora(b.down2)
    return Kit(m, images(), lr=.004, opt=Adam)
@case()
def mixer_smoothed(sick):    return Kit(Mixer(), images(), lr=.004, opt=Adam, loss=Smooth(), iters=300)
@case()
def mixer_cosine(sick):      return Kit(Mixer(), images(), lr=.004, opt=Adam, cbs=(cosine(.004),), iters=200)
@case()
def tcn_plus_100(sick):      return Kit(kaiming(tcn()), waves(), lr=.05, loss=Plus100())
@case()
def tcn_tiny_batch(sick):    return Kit(kaiming(tcn()), waves(), lr=.01, bs=4, iters=300)
@case()
def tcn_converged(sick):     return Kit(kaiming(tcn()), waves(), lr=.01, opt=Adam, iters=300)
@case()
def auto_noise(sick):        return Kit(xavier(auto()), pixels(1.5), lr=.003, opt=Adam, loss=MSE(), iters=200)
@case()
def auto_adam_deep(sick):    return Kit(auto(nn.Tanh, DEEP), pixels(), lr=.003, opt=Adam, loss=MSE())
@case()
def mobile_zero_gamma(sick):
    m = mobile()
    for b in m:
        if isinstance(b, Separable) and b.short: nn.init.zeros_(b.norm2.weight)
    return Kit(m, images(), lr=.2)
@case()
def mobile_adamw(sick):
    return Kit(mobile(), images(), lr=.005, opt=partial(Adam, decouple_wd=True), wd=.1, iters=200)
@case()
def vgg_dropout(sick):       return Kit(vgg(drop=.5), images(), lr=.1)
@case()
def vgg_frozen_body(sick):
    m = vgg(); m[:7].requires_grad_(False)
    return Kit(m, images(), lr=.1)
@case()
def emb_rare(sick):          return Kit(kaiming(Rows(1500)), categories(), lr=.01, opt=Adam)
@case()
def emb_noisy_labels(sick):  return Kit(kaiming(Rows()), categories(noise=.4), lr=.01, opt=Adam)
