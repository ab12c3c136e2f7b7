"From findings to a story: the first cause first, what it explains after it. What a cause is, its rule says."
from __future__ import annotations

from .._text import join, layer
from .thresholds import SETTLE


class Ranking:
    "Of the rules that judged, in their order; `known`: rules whose findings may come from others' hands."
    def __init__(self, rules, known=()):
        self.order = {f.__name__: k for k, f in enumerate(rules)}
        self.rules = {f.__name__: f for f in (*known, *rules)}

    def about(self, f, what):
        "What the finding's rule says of itself; None if nothing."
        return getattr(self.rules.get(f.rule), what, None)

    def sorted(self, r, findings):
        "Harm first, then in the order of cause, then by when it began; an outcome has the advice of its cause."
        by  = {}
        for f in findings: by.setdefault(f.rule, []).append(f)
        out = sorted(findings, key=lambda f: (f.severity == 'info', self._place(r, f, by), f.iters[0]))
        if not out or out[0].severity == 'info': return out
        return [f if f.rule == out[0].rule or self.about(f, 'explains') != () else
                f._replace(advice=f"what is advised for {out[0].rule}, its cause", first='') for f in out]

    def _place(self, r, f, by):
        own  = self.order.get(f.rule, len(self.order))
        move = self.about(f, 'place')
        side, other = move and move(r, f, by) or ('', '')
        return own if other not in self.order else self.order[other] + (.5 if side == 'after' else -.5)

    def cause(self, f):
        return (self.about(f, 'cause') or f.rule.replace('_', ' ')) + (f' ({layer(f.layer)})' if f.layer else '')

    def story(self, findings):
        "The findings that did harm in one sentence, each rule once."
        first, *then = dict.fromkeys(f.rule for f in findings if f.severity != 'info')
        lead = {f.rule: f for f in reversed(findings) if f.severity != 'info'}
        text = self.cause(lead[first])
        then = [self.cause(lead[n]._replace(layer='')) for n in then[:2]] + [f'{len(then) - 2} more'] * (len(then) > 2)
        when = 'from the start' if lead[first].iters[0] <= SETTLE else f"from iteration {lead[first].iters[0]}"
        return f"{text[0].upper()}{text[1:]} {when}{f'; with it: {join(then)}' if then else ''}."

    def past(self, f, learns):
        "A finding that did no harm that was measured."
        ended = self.about(f, 'ended')
        return ended.format(f.iters[1]) if ended else self.cause(f) + ', in spite of which it learns' * learns
