"""The words of a Comparison: is the better net's gradient smaller, and sooner? And small because of what?

Every yes, no and number is read from the Comparison; each clause has its wording for either outcome and for seeds that
disagree. Nothing here computes statistics.
"""
from __future__ import annotations

import numpy as np

from .._text import acc, between, join, num, of, pairs, pct, spread
from .phases import MEDIAN

NAMES    = {'norm': 'norm', '|mean|': 'mean', 'abs_max': 'largest element', '|median|': 'median'}
SMALLER  = {'yes': True, 'mostly yes': True, 'no': False, 'mostly no': False}
ORDER    = ['yes', 'mostly yes', 'undecided', 'mostly no', 'no']


def answer(c):
    "One paragraph on a Comparison."
    if len(c.runs) < 2: return f"Only {next(iter(c.runs))} was recorded: there is nothing to compare it with."
    if c.unranked: return (f"Which net is better cannot be told: of {join(c.unranked)} neither loss nor accuracy is "
                           f"known. In a plain loop give the loss to watch: w.loss(loss). {_bare(c)}".strip())
    return ' '.join(p for p in (_lead(c), _who(c), _sooner(c), _later(c), _per_loss(c), _same_size(c), _meaning(c),
                                _sick(c), _bare(c)) if p)


def _lead(c):
    worse, better = c.order
    if {c.state(worse, 'first'), c.state(better, 'last')} & {'non-finite', 'not measured'}:
        return "These runs do not tell."
    return {(True, True):   "Not by themselves: both kinds of small gradient are seen here.",
            (False, True):  "Here they come with convergence only.",
            (True, False):  "Not here: only starved gradients are seen.",
            (False, False): "These runs do not tell."}[
                c.state(worse, 'first') == 'starved', c.state(better, 'last') == 'converged']

def _who(c):
    worse, better = c.order
    loss = [c.value(n, 'last', 'iters', 'loss') for n in (better, worse)]
    good = [c.middle(n, 'last', 'epochs', 'accuracy') for n in (better, worse)]
    both = [(x, y) for x, y in zip(*loss) if np.isfinite(x) and np.isfinite(y)]
    wins = sum(x < y for x, y in both)
    ends = (f"loss {num(c.middle(better, 'last', 'iters', 'loss'))} against "
            f"{num(c.middle(worse, 'last', 'iters', 'loss'))}")
    if np.isfinite(good).all(): ends = f"accuracy {acc(good[0])} against {acc(good[1])}, {ends}"
    rest = f" of {len(c.runs)}, compared here with the worst, {worse}" if len(c.runs) > 2 else ''
    if not both: return (f"{better} ends the better net{rest}; the final losses cannot be compared, one net's is not "
                         f"finite in any seed.")
    if all(x == y for x, y in both):
        return f"Both end with the same, {ends}; {better} is called the better one here{rest}."
    if wins == len(both):
        return f"{better} ends the better net{rest}: {ends} (lower loss in {of(wins, len(both), 'seed')})."
    return (f"Which net is better these seeds do not settle: {better} ends with {ends}, but the lower loss in {wins} "
            f"of {len(both)} seeds only; it is called the better one here{rest}.")

def _when(c, phase):
    "The iterations of a phase: 'iterations 0–9', or 'the last 20 iterations' of runs of different lengths."
    span = c.span(phase)
    return f"iterations {span}" if span[0].isdigit() else f"the {span} iterations"

def _sooner(c):
    k = c.cells('first', 'norm')
    if not c.layers: return "Layer by layer they cannot be compared: no weight has the same name in every net."
    if not k.n: return (f"The norms of the weight gradients in {_when(c, 'first')} cannot be compared: not measured, "
                        f"or not finite.")
    return (f"Are its gradients smaller, sooner? {_when(c, 'first').capitalize()}: {k.says}, the norm of its weight "
            f"gradients is {spread(k.ratio)} times the other's, {pairs(k)}.")

def _later(c):
    cells  = {s: k for s in NAMES if (k := c.cells('last', s)).n}
    groups = {}
    for s, k in cells.items(): groups.setdefault(k.says, []).append(s)
    clauses, first = [], True
    for says in ORDER:
        if says not in groups: continue
        parts = []
        for s in groups[says]:
            parts.append(f"the {NAMES[s]} ({'smaller in ' if first else ''}{cells[s].smaller} of "
                         f"{cells[s].n}{' pairs' if first else ''}"
                         + (f", {spread(cells[s].ratio)} times" if s == 'norm' else '') + ')')
            first = False
        clauses.append(f"{says} for {join(parts)}")
    text = f"{_when(c, 'last').capitalize()}: {'; '.join(clauses)}." if clauses else ''
    for (name, seed), it in c.dead.items():
        left  = ' and is left out of this' if clauses else ''
        text += (f" {name} seed {seed} died at iteration {it}{left}: all its hidden gradients are exactly zero, at "
                 f"loss {num(c.value(name, 'last', 'iters', 'loss')[seed])}.")
    if 'norm' in cells and SMALLER.get(cells['norm'].says):
        cross = c.crossover()
        fell  = cross[np.isfinite(cross)]
        if len(fell): text += (f" The norm fell below the other's at iteration {between(fell)}"
                               + (f" ({len(fell)} of {len(cross)} seeds)." if len(fell) < len(cross) else '.'))
    return (text + _zeros(c, cells.get('|median|'))).strip()

def _zeros(c, median):
    "Why the median may be the odd one out: where half of the elements are exactly zero, so is their median."
    if median is None or median.larger == 0: return ''
    worse, better = c.order
    most = {n: max(((v, l) for l in c.layers if np.isfinite(v := c.middle(n, 'last', 'grad', 'frac_zero', l))),
                   default=(0, ''))
            for n in (worse, better)}
    if most[worse][0] < .2 or most[worse][0] <= most[better][0]: return ''
    return (f" Exact zeros, up to {pct(most[worse][0])} of {worse}'s gradient in {most[worse][1]} and "
            f"{pct(most[better][0])} of {better}'s, draw a median to zero.")

def _per_loss(c):
    k = c.cells('whole', 'per_loss')
    if not k.n: return ''
    was, now = SMALLER.get(c.cells('last', 'norm').says), SMALLER.get(k.says)
    if   now is None: order = 'is undecided'
    elif was is None: order = 'is clear'
    else:             order = 'stays' if was == now else 'is mostly reversed' if 'mostly' in k.says else 'is reversed'
    return (f"Per unit of loss the order {order}: norm / loss, averaged over the fit, is {spread(k.ratio)} times the "
            f"other's, {pairs(k)}.")

def _same_size(c):
    if c.layer is None or not c.cells('first', 'norm').n: return ''
    if any(n[0] in c.order for n in c.nonfinite) and not c.cells('last', 'norm').n: return ''
    worse, better = c.order
    pair = c.twins()
    if pair is None: return f"At no time is |g| of {c.layer} early in {worse} as small as late in {better}."
    words, es = [], []
    for name in (worse, better):
        _, it, norm, loss, e, gain = pair[name]
        words.append(f"{num(norm)} in {name} at iteration {int(it)} (loss {num(loss)}, elasticity {num(e)}, gain "
                     f"{num(gain)})")
        es.append(e)
    apart = max(es) / min(es) if min(es) > 0 else np.inf
    tell  = ("their elasticity was not measured" if np.isnan(es).any() else
             f"elasticity tells them apart by a factor of {num(apart)}" if apart >= 10 else
             "elasticity does not tell them apart")
    return f"An equal |g| of {c.layer} is found at both ends, {words[0]} and {words[1]}: {tell}."

def _meaning(c):
    worse, better = c.order
    a, b = c.state(worse, 'first'), c.state(better, 'last')
    show = lambda n, p: (f"elasticity {num(c.middle(n, p, 'grad', 'elasticity', MEDIAN))}, "
                         f"gain {num(c.middle(n, p, 'iters', 'gain'))}")
    none = [n for n, s in ((worse, a), (better, b)) if s == 'not measured']
    if none: return (f"Whether small means starved or converged cannot be told: elasticity was not measured of "
                     f"{join(none)}; it needs 'norm' of 'grad' and of 'weight', and the loss.")
    said  = lambda s: 'in a state that cannot be told' if s == 'cannot tell' else s
    begin = f"{worse} begins {said(a)} ({show(worse, 'first')})"
    end   = f"{better} ends {said(b)} ({show(better, 'last')})"
    if a == 'starved' and b == 'converged':
        return (f"What separates the two kinds is elasticity and gain: {begin}, its gradients small before anything is "
                f"learned; {end}, its gradients small because its loss is.")
    if b == 'converged':
        return f"Small gradients are the mark of a converged net here: {end}. Starvation is not seen: {begin}."
    if a == 'starved':
        return f"Small gradients are no sign of good training here: {begin}. Convergence is not seen: {end}."
    return (f"Small because starved against small because converged is not seen, so the question stays open: {begin}, "
            f"{end}.")

def _sick(c):
    runs = [f"{name} seed {seed} from iteration {it}" for (name, seed), it in c.nonfinite.items()]
    return f"Not finite, and from there on in no median: {join(runs)}." if runs else ''

def _bare(c):
    "The nets of which a record holds no measured iteration."
    bare = [n for n, recs in c.runs.items() if not any(r.iters.measured.any() for r in recs)]
    return (f"Of {join(bare)} nothing was measured but loss and accuracy: no iteration was due, see `every`."
            if bare else '')
