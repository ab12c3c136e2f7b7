"""`diagnose`: the rules' findings in order of cause, a verdict for every layer, and one sentence for the network."""
from __future__ import annotations

import warnings
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd

from .answering import join, num, pct
from .evidence import FEWEST, WINDOW, run, slope, trailing
from .record import DERIVED
from .rules import ALL, Unreadable
from .thresholds import AWAKE, SETTLE, STARVED

VERDICTS = ('healthy', 'converged', 'starved', 'waking', 'dead', 'saturated', 'exploding', 'frozen', 'cannot tell')
FLAT     = .02                    # a loss that changes by less than this share of what was learned, over a window, is flat
FAR      = .33                    # gradient below this share of its own peak
LEARNED  = .2                     # gain as a share of the best constant answer's loss that is high, or
CLEAR    = 20                     # so many batch-to-batch deviations of the loss
DEAD     = .5                     # share of dead units above which a layer is called dead, as the rule has it
CAUSES   = {'non_finite': "values are not finite", 'exploding': "the gradient explodes", 'starved': "the network is starved of gradient",
            'vanishing': "the gradient vanishes on its way back", 'dead_units': "units are dead", 'saturated': "activations are saturated",
            'step_too_large': "a step was too large", 'step_too_small': "the steps are too small", 'bad_init': "the initialisation is off scale",
            'not_learning': "nothing is learned", 'unstable': "the loss is unstable", 'fp16_underflow': "gradients underflow in half precision",
            'input_scale': "the input is off scale", 'double_softmax': "softmax is taken twice", 'not_stepped': "some weights are never stepped", 'not_zeroed': "gradients are kept from step to step"}


class Skipped(NamedTuple):
    "A rule that could not judge, why, and what to record."
    rule: str
    why:  str
    how:  str

class Report:
    "What `diagnose` found: `verdict`, `findings`, `checked`, `skipped`, `layers`."
    def __init__(self, verdict, findings, checked, skipped, layers, trials=None):
        self.verdict, self.findings, self.checked, self.skipped, self.layers = verdict, findings, checked, skipped, layers
        self.trials = trials                      # before and after each fix, from verify=True

    @property
    def critical(self): return any(f.severity == 'critical' for f in self.findings)
    @property
    def ok(self):
        "Whether nothing of severity warning or worse was found."
        return all(f.severity == 'info' for f in self.findings)

    def __repr__(self):
        out = [self.verdict]
        for k, f in enumerate(self.findings, 1):
            span = f"iterations {f.iters[0]} to {f.iters[1]}" if f.iters[0] != f.iters[1] else f"iteration {f.iters[0]}"
            out.append(f"\n{k}. {f.rule} ({f.severity}){f' in {f.layer}' if f.layer else ''}, {span}\n   {_sentence(f.evidence)}")
            if f.severity != 'info' and f.advice: out.append(f"   Try: {f.advice}.")
            if self.trials and f.rule in self.trials: out.append(f"   Tried: {self.trials[f.rule]}")
        table = self.layers
        if len(table):
            by = table.groupby('verdict', sort=False).layer.apply(list)
            out.append('\nLayers: ' + '; '.join(f"{v}: {', '.join(ls[:6])}{f' and {len(ls) - 6} more' if len(ls) > 6 else ''}" for v, ls in by.items()))
        out.append(f"\nChecked: {', '.join(self.checked) or 'nothing'}.")
        for s in self.skipped: out.append(f"Skipped: {s.rule}, {s.why}." + (f" {s.how}" if s.how else ''))
        return '\n'.join(out)

    def _repr_html_(self):
        color = dict(info='#555', warning='#a60', critical='#b00')
        rows  = ''.join(f"<tr><td style='color:{color[f.severity]};vertical-align:top'><b>{escape(f.rule)}</b><br>{f.severity}</td>"
                        f"<td style='vertical-align:top'>{escape(f.layer)}<br>{f.iters[0]}–{f.iters[1]}</td><td style='text-align:left'>"
                        f"{escape(_sentence(f.evidence))}{f'<br><i>Try:</i> {escape(f.advice)}.' if f.severity != 'info' and f.advice else ''}"
                        f"{f'<br><i>Tried:</i> {escape(self.trials[f.rule])}' if self.trials and f.rule in self.trials else ''}</td></tr>"
                        for f in self.findings)
        head  = f"<p><b>{escape(self.verdict)}</b></p>"
        table = f"<table><tr><th>finding</th><th>where, iterations</th><th>evidence</th></tr>{rows}</table>" if rows else ''
        lays  = self.layers.to_html(index=False, na_rep='–', float_format=lambda v: num(v)) if len(self.layers) else ''
        skip  = ''.join(f"<li>{escape(s.rule)}: {escape(s.why)}. {escape(s.how)}</li>" for s in self.skipped)
        return (f"{head}{table}<details><summary>layers</summary>{lays}</details><p>Checked: {', '.join(self.checked) or 'nothing'}.</p>"
                + (f"<p>Skipped:</p><ul>{skip}</ul>" if skip else ''))

    def json(self):
        "Everything as plain lists and dicts; numbers that are not finite are None."
        plain = lambda o: ({k: plain(v) for k, v in o.items()} if isinstance(o, dict) else [plain(v) for v in o] if isinstance(o, (list, tuple))
                           else o.item() if isinstance(o, np.integer) else (float(o) if np.isfinite(o) else None) if isinstance(o, (float, np.floating)) else o)
        return plain(dict(verdict=self.verdict, critical=self.critical, findings=[f._asdict() for f in self.findings], checked=list(self.checked),
                          skipped=[s._asdict() for s in self.skipped], layers=self.layers.to_dict('records')))

def _sentence(s): return s[:1].upper() + s[1:] + '.'


def diagnose(
    rec,                          # a Record, or a Learner (its layer_stats)
    rules=ALL,                    # functions of a Record that yield Findings
    *,
    verify=False,                 # a Learner's first fix is tried on a copy for 50 iterations, before and after are shown
):
    "What is wrong, where, since when, on what evidence, what to do. What was not measured is skipped, never called healthy."
    if hasattr(rec, 'layer_stats'):
        if verify: return rec.diagnose(rules=rules, verify=True)                   # training: the callbacks' side
        rec = rec.layer_stats
    if rec is None: raise ValueError("this Learner has recorded nothing: fit it with cbs=LayerStatsCallback()")
    if verify: raise ValueError("verify=True trains a copy: give diagnose the Learner, not its record")
    with warnings.catch_warnings(), np.errstate(all='ignore'):                     # what is not measured or not finite is expected here
        warnings.simplefilter('ignore', RuntimeWarning)
        return _judge(rec, rules)

def _judge(rec, rules):
    r = run(rec)
    findings, checked, skipped = [], [], []
    for f in rules:
        lacks = missing(rec, f)
        if lacks: skipped.append(Skipped(f.__name__, f"{join([_said(k) for k in lacks])} not recorded", _how(lacks))); continue
        if not len(r): skipped.append(Skipped(f.__name__, "no iteration was measured", '')); continue
        try: found = list(f(rec))
        except Unreadable as e: skipped.append(Skipped(f.__name__, str(e), '')); continue
        findings += found
        checked.append(f.__name__)
    order    = {f.__name__: i for i, f in enumerate(rules)}
    findings = sorted(findings, key=lambda f: _rank(f, order, findings))
    table    = layer_verdicts(rec, findings)
    return Report(_verdict(r, findings, checked, skipped, table), findings, checked, skipped, table)


# --- what a rule needs -----------------------------------------------------------------------------------------------
def missing(rec, rule):
    "The (probe, statistic) pairs that a rule needs and the record has not, or never measured."
    out = []
    for need in getattr(rule, 'needs', ()):
        options = need if isinstance(need, list) else [need]
        if not any(_has(rec, k) for k in options): out.append(options[0])
    return out

def _has(rec, key):
    probe, stat = key
    if probe == 'iters': return bool(np.isfinite(rec.iters[stat].to_numpy(float)).any()) or stat == 'loss' and bool(np.isinf(rec.iters.loss).any())
    if key not in rec: return False
    v = rec[key]
    if v.size == 0: return key in rec.windows and False
    return True

def _said(key): return f"the {key[1].replace('_', ' ')}" if key[0] == 'iters' else f"{key[1]!r} of {key[0]!r}"

def _how(keys):
    want = {}
    for p, s in keys:
        if p == 'iters': continue
        parts = dict(elasticity=[('grad', 'norm'), ('weight', 'norm')], ratio=[('update', 'norm'), ('weight', 'norm')])[s] if (p, s) in DERIVED and s in ('elasticity', 'ratio') else [(p, s)]
        for q, t in parts: want.setdefault(q, []).append(t)
    out = []
    if want: out.append('Record with LayerStatsCallback(' + ', '.join(f"{p}=[..., {', '.join(map(repr, dict.fromkeys(ss)))}]" for p, ss in want.items()) + ').')
    if any(p == 'iters' for p, _ in keys): out.append("In a plain loop give the loss to watch: w.loss(loss).")
    return ' '.join(out)


# --- first cause -----------------------------------------------------------------------------------------------------
def _rank(f, order, findings):
    "Harm first; then what came clearly first; then in the order of cause."
    place = order.get(f.rule, len(order))
    if f.rule == 'dead_units' and f.value < .95 and {'vanishing', 'starved'} & {g.rule for g in findings}:
        place = order.get('starved', place) + .5          # half of the units silent is an effect of signals that fade
    return f.severity == 'info', place, f.iters[0]

def _chain(findings):
    "The findings that did harm as one story, first cause first, each rule once."
    out, seen = [], set()
    for f in findings:
        if f.severity == 'info' or f.rule in seen: continue
        seen.add(f.rule)
        what = CAUSES.get(f.rule, f.rule.replace('_', ' '))
        when = 'from the start' if f.iters[0] <= SETTLE else f"from iteration {f.iters[0]}"
        out.append(f"{what}{f' ({f.layer})' if f.layer else ''} {when}")
    return out

def _verdict(r, findings, checked, skipped, table):
    bad = [f for f in findings if f.severity != 'info']
    if bad:
        first, *then = _chain(findings)
        text = first[0].upper() + first[1:]
        if then: text += f"; with it: {join(then)}"
        return f"{text}. First try: {bad[0].advice}." if bad[0].advice else text + '.'
    if not checked: return "Nothing could be checked."
    if not len(r) or len(r) < SETTLE + FEWEST: return f"{len(r)} measured iterations are too few to judge; nothing is wrong so far."
    state = network_state(r)[-1] if r.has_loss else 'cannot tell'
    gain  = r.learned[-1]
    nums  = f"loss {num(r.first_loss)} -> {num(trailing(r.loss)[-1])}" + (f", gain {num(gain)}" if np.isfinite(gain) else '')
    text  = {'converged': f"Converged: the gradients are small because little is left to learn ({nums})", 'learning': f"It learns ({nums})",
             'waking': f"It has begun to move ({nums}, elasticity rising)", 'cannot tell': f"No fault was found, but whether it learns cannot be told ({nums})"}[state]
    was   = [f for f in findings if f.severity == 'info']
    if was: text += "; " + join([_past(f) for f in was[:2]])
    if skipped: text += f"; {len(skipped)} rule{'s' if len(skipped) > 1 else ''} could not be checked"
    return text + '.'

def _past(f):
    if f.rule == 'starved': return f"it was starved until iteration {f.iters[1]}"
    return f"{CAUSES.get(f.rule, f.rule)}{f' ({f.layer})' if f.layer else ''}, in spite of which it learns"


# --- the network and its layers --------------------------------------------------------------------------------------
def network_state(r):
    "converged, learning, waking, starved or cannot tell, at every measured row.  # (row,) object"
    e, learned, noise = trailing(r.median_elasticity), r.learned, r.noise
    long  = min(2 * WINDOW, max(WINDOW, len(r) // 3))
    s, t  = slope(r.loss, long)
    g     = r.get('grad', 'norm', r.layers) if r.layers and ('grad', 'norm') in r.rec else np.full((len(r), 1), np.nan)
    with np.errstate(invalid='ignore', over='ignore'):
        g    = trailing(np.sqrt(np.nansum(g ** 2, axis=1)))
        peak = pd.Series(g).cummax().to_numpy()
        high = (learned > LEARNED * abs(r.best_constant)) | (learned > CLEAR * noise)
        flat = np.abs(s * long) < np.maximum(FLAT * learned, noise)
        out  = np.full(len(r), 'cannot tell', object)
        live = ~r.blind & (np.isfinite(learned) | np.isfinite(e)) & r.judged
        if not np.isfinite(r.best_constant): live &= r.falling | (trailing(r.loss) < .5 * r.first_loss)
        out[live] = 'learning'
        out[r.blind & r.falling & r.judged & ~(e < STARVED)] = 'learning'
        out[live & high & flat & (g < FAR * peak)] = 'converged'
        out[r.starving] = 'starved'
        wake = r.waking()[0] & r.blind & r.judged & (e < AWAKE)
        out[wake] = 'waking'
    return out

def layer_verdicts(rec, findings):
    "DataFrame layer, probe, verdict, for, against: every weight with two or more dimensions and every activation."
    r   = run(rec)
    by  = {}
    for f in findings:
        if f.severity != 'info' and (f.rule != 'exploding' or f.iters[1] >= r.iter[-min(WINDOW, len(r))]):     # as it is at the end
            for l in f.layers or ((f.layer,) if f.layer else ()): by.setdefault(l, []).append(f)
    out = []
    if not len(r): return pd.DataFrame(out, columns=['layer', 'probe', 'verdict', 'for', 'against'])
    state = network_state(r)[-1] if r.has_loss and len(r) >= SETTLE + FEWEST else 'cannot tell'
    gain  = r.learned[-1]
    if r.layers and ('grad', 'norm') not in rec:
        out += [(l, 'grad', 'cannot tell', '', "the norm of its gradient was not recorded") for l in r.layers]
    elif r.layers:
        have = (lambda p, s: (p, s) in rec)
        g    = r.get('grad', 'norm', r.layers)
        e    = r.elasticity if have('grad', 'elasticity') and r.positive else np.full(g.shape, np.nan)
        low  = trailing(e)[-1]
        u    = r.get('update', 'ratio', r.layers) if have('update', 'ratio') else np.full(g.shape, np.nan)
        for k, l in enumerate(r.layers):
            rules = {f.rule for f in by.get(l, ())}
            tail  = g[-WINDOW:, k]
            nums  = f"elasticity {num(low[k])}, gain {num(gain)}"
            small = tail[np.isfinite(tail)]
            peak  = np.nanmax(g[:, k]) if np.isfinite(g[:, k]).any() else np.nan
            share = f"gradient at {pct(np.median(small) / peak)} of its own peak" if len(small) and peak > 0 else ''
            wakes, when = r.waking(np.where(e[:, k] > 0, e[:, k], np.nan)) if len(r) >= WINDOW else ([False], [np.nan])
            if 'exploding' in rules or 'non_finite' in rules or len(small) < len(tail) and np.isinf(tail).any():
                v, pro, con = 'exploding', next((f.evidence for f in by.get(l, ()) if f.rule in ('exploding', 'non_finite')), 'its gradient is infinite'), ''
            elif 'not_stepped' in rules: v, pro, con = 'frozen', 'it receives a gradient but is never stepped', share
            elif not len(small):         v, pro, con = 'frozen', 'it received no gradient', ''
            elif len(small) >= 3 and not small.any():
                v, pro, con = 'dead', f"its gradient is exactly zero in the last {len(small)} iterations", f"gain {num(gain)}"
            elif state == 'starved' and low[k] < STARVED: v, pro, con = 'starved', nums, share
            elif state == 'waking':      v, pro, con = 'waking', nums + ', rising' + (f"; forecast to pass {AWAKE:g} at iteration {when[-1]:.0f}" if wakes[-1] else ''), ''
            elif state == 'converged':   v, pro, con = 'converged', f"loss flat, {share}, gain {num(gain)}", f"elasticity {num(low[k])}" if low[k] < STARVED else ''
            elif state == 'learning':
                if np.isfinite(low[k]) and low[k] < STARVED: v, pro, con = 'cannot tell', f"the network learns (gain {num(gain)})", f"elasticity of this layer {num(low[k])}"
                elif not np.isfinite(low[k]): v, pro, con = 'cannot tell', f"the network learns (gain {num(gain)})", 'elasticity was not measured'
                else: v, pro, con = 'healthy', f"{nums}, update ratio {num(np.nanmedian(u[-WINDOW:, k]) if np.isfinite(u[-WINDOW:, k]).any() else np.nan)}", ''
            else: v, pro, con = 'cannot tell', nums, ''
            out.append((l, 'grad', v, pro, con))
    if 'activation' in rec.layers:
        dead = rec['activation', 'frac_dead'][-1] if ('activation', 'frac_dead') in rec and len(rec['activation', 'frac_dead']) else None
        for k, l in enumerate(rec.layers['activation'].layer):
            d, fs = (float(dead[k]) if dead is not None else np.nan), {f.rule: f for f in by.get(l, ())}
            if 'non_finite' in fs:               v, pro, con = 'exploding', fs['non_finite'].evidence, ''
            elif 'saturated' in fs:              v, pro, con = 'saturated', fs['saturated'].evidence, ''
            elif np.isfinite(d) and d > DEAD:    v, pro, con = 'dead', f"{pct(d)} of its units are dead", f"gain {num(gain)}"
            elif not np.isfinite(d) or state not in ('learning', 'converged'): v, pro, con = 'cannot tell', '', f"{pct(d)} of its units are dead"
            else:                                v, pro, con = 'healthy', f"{pct(1 - d)} of its units vary", ''
            out.append((l, 'activation', v, pro, con))
    return pd.DataFrame(out, columns=['layer', 'probe', 'verdict', 'for', 'against'])
