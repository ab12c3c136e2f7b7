"The zoo's tuned half: the rules' thresholds were set on MLP, plain CNN, tabular, ResNet, RNN, LSTM, transformer."
from __future__ import annotations

from functools import partial

import torch
from fastai.callback.training import GradientClip
from fastai.optimizer import Adam
from torch import nn
from zoo_cases.kit import (InHalf, KeepGrads, Kit, Plus100, Smooth, Spike, Tiny, bigrams, case, cosine, images, kaiming,
                           normal, raw, rows, scaled, table, text, warm_up, xavier)
from zoo_cases.nets import Block, Lora, Recurrent, SigmoidRNN, Transformer, cnn, mlp, resnet

def tab(depth=4): return kaiming(mlp(depth, n_in=12, n_out=1))

# --- twins: sick and healthy differ by one line ----------------------------------------------------------------------
@case('bad_init', 'starved', 'vanishing')
def mlp_small_init(sick):     return Kit(normal(mlp(6), .01) if sick else kaiming(mlp(6)), images(True))
@case('bad_init', 'exploding', 'step_too_large', 'non_finite')
def mlp_big_init(sick):       return Kit(kaiming(mlp(8), 3. if sick else 1.), images(True), lr=.05)
@case('vanishing', 'starved', 'bad_init')
def mlp_deep_sigmoid(sick):   return Kit(mlp(6, nn.Sigmoid) if sick else kaiming(mlp(6)), images(True))
@case('saturated', 'bad_init')
def mlp_tanh_saturated(sick): return Kit(xavier(mlp(5, nn.Tanh), 12. if sick else 1.), images(True))
@case('bad_init')
def mlp_zero_init(sick):      return Kit(normal(mlp(4), 0.) if sick else kaiming(mlp(4)), images(True))
@case('not_zeroed')
def mlp_no_zero_grad(sick):   return Kit(kaiming(mlp(4)), images(True), cbs=(KeepGrads(),) if sick else ())
@case('double_softmax')
def mlp_softmax_twice(sick):
    return Kit(nn.Sequential(kaiming(mlp(4)), *([nn.Softmax(1)] if sick else [])), images(True))
@case('fp16_underflow')
def mlp_fp16_underflow(sick):
    m = kaiming(mlp(4))
    return Kit(InHalf(m) if sick else m, images(True), lr=.1 * 2 ** 18, loss=Tiny())
@case('step_too_large', 'dead_units')
def mlp_lr_spike(sick):       return Kit(kaiming(mlp(4)), images(True), cbs=(Spike(40, 300.),) if sick else ())
@case('dead_units', guilty='2', site='3')
def mlp_dead_layer(sick):
    m = kaiming(mlp(4))
    if sick: m[2].bias.data.fill_(-20.)
    return Kit(m, images(True))
@case('dead_units')
def cnn_bias_minus10(sick):
    m = kaiming(cnn())
    if sick: [nn.init.constant_(c.bias, -10.) for c in m if isinstance(c, nn.Conv2d)]
    return Kit(m, images(), lr=.2)
@case('step_too_large', 'non_finite', 'exploding')
def cnn_lr_100x(sick):        return Kit(kaiming(cnn()), images(), lr=20. if sick else .2)
@case('step_too_small')
def cnn_lr_1000th(sick):      return Kit(kaiming(cnn()), images(), lr=.0002 if sick else .2)
@case('input_scale')
def cnn_input_255(sick):      return Kit(kaiming(cnn()), scaled(images(), raw) if sick else images(), lr=.2)
@case('vanishing', 'starved', 'bad_init')
def cnn_deep_plain(sick):     return Kit(cnn((8,) * 14, norm=not sick), images(), lr=.1)
@case('starved', 'vanishing', 'bad_init')
def cnn_default_init(sick):
    m = cnn((8, 16, 32, 32))
    return Kit(m if sick else kaiming(m), images(), lr=.2, iters=80)
@case('not_stepped', 'step_too_small')
def cnn_body_not_stepped(sick):
    m = kaiming(cnn())
    return Kit(m, images(), lr=.2, hidden=m[:6] if sick else None)
@case('input_scale')
def tab_unscaled(sick):
    return Kit(tab(), scaled(table(), lambda x: 300 + 100 * x) if sick else table(), lr=.02, loss=nn.MSELoss())
@case('step_too_large', 'exploding', 'non_finite')
def tab_lr_100x(sick):        return Kit(tab(), table(), lr=2. if sick else .02, loss=nn.MSELoss())
@case('step_too_small')
def tab_lr_1000th(sick):      return Kit(tab(), table(), lr=2e-5 if sick else .02, loss=nn.MSELoss())
# --- twins: the other architectures ----------------------------------------------------------------------------------
@case('step_too_large', 'exploding', 'non_finite', 'unstable')
def resnet_lr_100x(sick):     return Kit(resnet(), images(), lr=20. if sick else .2)
@case('step_too_small')
def resnet_lr_1000th(sick):   return Kit(resnet(), images(), lr=.0001 if sick else .1)
@case('not_zeroed')
def resnet_no_zero_grad(sick):return Kit(resnet(), images(), lr=.3, cbs=(KeepGrads(),) if sick else ())
@case('not_stepped', 'step_too_small')
def resnet_body_not_stepped(sick):
    m = resnet()
    return Kit(m, images(), lr=.1, hidden=m[:7] if sick else None)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def resnet_big_init(sick):    return Kit(kaiming(resnet(6, norm=False), 3. if sick else .7), images(), lr=.05)
@case('input_scale')
def resnet_input_255(sick):
    return Kit(kaiming(resnet(norm=False), .8), scaled(images(), raw) if sick else images(), lr=.05)
@case('vanishing', 'starved')
def rnn_sigmoid(sick):        return Kit(SigmoidRNN(act=nn.Sigmoid if sick else nn.Tanh), rows(images()), lr=.2)
@case('bad_init', 'exploding', 'non_finite', 'step_too_large')
def rnn_explode(sick):
    m = Recurrent('RNN', nonlinearity='relu', repeat=3)
    nn.init.orthogonal_(m.rnn.weight_hh_l0, 2. if sick else .9)
    return Kit(m, rows(images()), lr=.1)
@case('saturated', guilty='inp', site='act')
def rnn_tanh_saturated(sick):
    m = SigmoidRNN(act=nn.Tanh)
    if sick: nn.init.normal_(m.inp.weight, std=20.)
    return Kit(m, rows(images()), lr=.1)
@case('step_too_large', 'unstable', 'exploding')
def lstm_lr_1000x(sick):      return Kit(Recurrent('LSTM'), rows(images()), lr=500. if sick else .5)
@case('step_too_small')
def lstm_lr_1000th(sick):     return Kit(Recurrent('LSTM'), rows(images()), lr=1e-5 if sick else .01, opt=Adam)
@case('starved', 'bad_init', 'vanishing')
def lstm_small_init(sick):
    m = Recurrent('LSTM')
    if sick: normal(m, .001)
    return Kit(m, rows(images()), lr=.5)
@case('step_too_large', 'unstable', 'exploding')
def tf_lr_100x(sick):         return Kit(Transformer(), text(), lr=.5 if sick else .005, opt=Adam)
@case('double_softmax')
def tf_softmax_twice(sick):   return Kit(Transformer(softmax=sick), text(), lr=.005, opt=Adam)
@case('bad_init')
def tf_zero_init(sick):       return Kit(normal(Transformer(), 0.) if sick else Transformer(), text(), lr=.3)
@case('dead_units')
def tf_dead_ff(sick):
    m = Transformer()
    if sick: [nn.init.constant_(b.up.bias, -30.) for b in m.blocks]
    return Kit(m, text(), lr=.005, opt=Adam)
@case('fp16_underflow')
def tf_fp16_underflow(sick):
    m = Transformer()
    return Kit(InHalf(m) if sick else m, text(), lr=.15 * 2 ** 18, loss=Tiny())
@case('step_too_small')
def tf_lr_1000th(sick):       return Kit(Transformer(), text(), lr=5e-6 if sick else .005, opt=Adam)

# --- twins: the fault sits in one layer ------------------------------------------------------------------------------
@case('bad_init', guilty='4', site='5')
def mlp_one_zero(sick):
    m = kaiming(mlp(5))
    if sick: nn.init.zeros_(m[4].weight)
    return Kit(m, images(True))
@case('saturated', 'bad_init', guilty='2', site='3')
def mlp_one_saturated(sick):
    m = xavier(mlp(5, nn.Tanh))
    if sick: nn.init.constant_(m[2].bias, 10.)
    return Kit(m, images(True))
@case('not_stepped', 'step_too_small', guilty='6')
def mlp_head_not_stepped(sick):
    m = kaiming(mlp(4)); nn.init.zeros_(m[6].weight)
    return Kit(m, images(True), hidden=m[6] if sick else None)
@case('not_stepped', 'step_too_small', guilty='0')
def mlp_neck_not_stepped(sick):
    m = nn.Sequential(nn.Linear(196, 3), *kaiming(mlp(3, n_in=3)))
    return Kit(m, images(True), hidden=m[0] if sick else None, iters=200)
@case('bad_init', guilty='2', site='3')
def cnn_one_zero(sick):
    m = kaiming(cnn())
    if sick: nn.init.zeros_(m[2].weight)
    return Kit(m, images(), lr=.2)
@case('dead_units', guilty='4', site='5')
def cnn_one_dead(sick):
    m = kaiming(cnn())
    if sick: nn.init.constant_(m[4].bias, -10.)
    return Kit(m, images(), lr=.2)
@case('bad_init', 'exploding', 'step_too_large', 'non_finite', guilty='2', site='3')
def tab_one_big(sick):
    m = tab()
    if sick: m[2].weight.data.mul_(30.)
    return Kit(m, table(), lr=.02, loss=nn.MSELoss())
@case('dead_units', guilty='4', site='5')
def tab_one_dead(sick):
    m = tab()
    if sick: nn.init.constant_(m[4].bias, -30.)
    return Kit(m, table(), lr=.02, loss=nn.MSELoss())
@case('dead_units', guilty='1', site='2')
def resnet_stem_dead(sick):
    m = resnet()
    if sick: nn.init.constant_(m[1].bias, -10.)
    return Kit(m, images(), lr=.1)
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def lstm_head_big(sick):
    m = Recurrent('LSTM')
    if sick: m.head.weight.data.mul_(300.)
    return Kit(m, rows(images()), lr=.5)
@case('bad_init', 'exploding', 'step_too_large', guilty='head')
def tf_head_big(sick):
    m = Transformer()
    if sick: m.head.weight.data.mul_(100.)
    return Kit(m, text(), lr=.005, opt=Adam)

# --- healthy runs that fool naive rules ------------------------------------------------------------------------------
@case()
def mlp_smoothed(sick):       return Kit(kaiming(mlp(4)), images(True), loss=Smooth(), iters=300, lr=.2)
@case()
def mlp_dropout(sick):        return Kit(kaiming(mlp(4, drop=.5)), images(True))
@case()
def mlp_tiny_batch(sick):     return Kit(kaiming(mlp(4)), images(True), bs=4, lr=.02, iters=300)
@case()
def mlp_clipped(sick):        return Kit(kaiming(mlp(4)), images(True), lr=.5, cbs=(GradientClip(.05),))
@case()
def mlp_adam_deep(sick):      return Kit(mlp(8), images(True), lr=.003, opt=Adam)
@case()
def mlp_noisy_labels(sick):
    (x, y), v = images(True)
    g = torch.Generator().manual_seed(3)
    y = torch.where(torch.rand(len(y), generator=g) < .4, torch.randint(0, 10, y.shape, generator=g), y)
    return Kit(kaiming(mlp(4)), ((x, y), v))
@case()
def mlp_converged(sick):      return Kit(kaiming(mlp(4)), images(True), lr=.3, iters=400)
@case()
def cnn_plus_100(sick):       return Kit(kaiming(cnn()), images(), lr=.2, loss=Plus100())
@case()
def cnn_zero_head(sick):
    m = kaiming(cnn()); normal(m[-1], 0.)
    return Kit(m, images(), lr=.2)
@case()
def cnn_cosine(sick):         return Kit(kaiming(cnn()), images(), lr=.3, cbs=(cosine(.3),), iters=200)
@case()
def cnn_frozen_body(sick):
    m = kaiming(cnn()); m[:6].requires_grad_(False)
    return Kit(m, images(), lr=.3)
@case()
def tab_noise(sick):
    d = tuple((x, y + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(4))) for x, y in table())
    return Kit(tab(3), d, lr=.01, loss=nn.MSELoss(), iters=200)
@case()
def resnet_zero_gamma(sick):
    m = resnet()
    for b in m:
        if isinstance(b, Block): nn.init.zeros_(b.norm2.weight)
    return Kit(m, images(), lr=.2)
@case()
def resnet_converged(sick):   return Kit(resnet(), images(), lr=.005, opt=Adam, iters=300, cbs=(cosine(.005),))
@case()
def resnet_adamw(sick):
    return Kit(resnet(), images(), lr=.003, opt=partial(Adam, decouple_wd=True), wd=.1, iters=200)
@case()
def rnn_clipped(sick):        return Kit(Recurrent('RNN'), rows(images()), lr=.5, cbs=(GradientClip(.2),))
@case()
def lstm_smoothed(sick):      return Kit(Recurrent('LSTM'), rows(images()), lr=.01, opt=Adam, loss=Smooth(), iters=300)
@case()
def tf_bigram(sick):          return Kit(Transformer(vocab=20), bigrams(), lr=.005, opt=Adam, iters=200)
@case()
def tf_warm_up(sick):         return Kit(Transformer(), text(), lr=.005, opt=Adam, cbs=(warm_up(.005),))
@case()
def tf_rare_embeddings(sick): return Kit(Transformer(vocab=2000), text(), lr=.005, opt=Adam)
@case()
def tf_lora(sick):
    m = Transformer()
    for b in m.blocks: b.up, b.down = Lora(b.up), Lora(b.down)
    return Kit(m, text(), lr=.005, opt=Adam)
