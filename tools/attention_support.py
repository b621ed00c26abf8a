"""Which timm families work with the attention adapter and the localizers that read attention.

    python tools/attention_support.py [--families ViT Swin …] [--what attention ClassAttention …]

The attention half of tools/token_support.py: the same nets, verdicts, columns and table
(nbs/results/token_support.csv). `right` was checked against the attention that the net's own modules show
when they are written out (`fused_attn = False` and a hook where attention is dropped), where they can be,
and against the formulas in full matrices; `refused` where a ValueError names what is in the way; `wrong`
else.
"""
import argparse
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from token_support import FAMILIES, Wrong, check, made

from wsol_nb.results import Rows, origin, results_folder
from wsol_nb.vit.attention import ClassAttention
from wsol_nb.vit.layout import in_words, layers_of, learn_attention
from wsol_nb.vit.reading import AllRows, KeptCalls, read_attention
from wsol_nb.vit.relevance import AttentionGradient, LeGrad
from wsol_nb.vit.rollout import Rollout


@contextmanager
def written_out(net):
    "The net's attention as its own modules show it: {name: A}, filled in a pass."
    shown, undo = {}, []
    for name, m in net.named_modules():
        drop = getattr(m, 'attn_drop', None)
        if not isinstance(drop, torch.nn.Module) or hasattr(m, 'proj_w'): continue # mixed before it is shown
        if hasattr(m, 'fused_attn'):
            undo.append((m, m.fused_attn))
            m.fused_attn = False
        def keep(d, args, out, name=name):
            if out.requires_grad: out.retain_grad()
            shown[name] = out
        undo.append(drop.register_forward_hook(keep))
    try: yield shown
    finally:
        for u in undo:
            if isinstance(u, tuple): u[0].fused_attn = u[1]
            else: u.remove()


def attention(family, net, x):
    "Rows of every layer that can be read."
    layout = learn_attention(net, x)
    layers_of(layout, 'any')
    with torch.no_grad():
        logits, _, (kept,) = read_attention(net, x, KeptCalls(), layout=layout)
        plain = net(x)
        with written_out(net) as shown: net(x)
    check((logits - plain).abs().max() < 1e-4, 'other logits')
    hw, compared = layout.grid[0]*layout.grid[1], 0
    for layer, call in kept:
        A = call.rows()
        check(A.shape[3] == layer.prefix + hw, f'{layer.name}: {A.shape[3]} keys')
        check((A.sum(-1) - 1).abs().max() < 1e-4, f'{layer.name}: rows do not sum to 1')
        if layer.name not in shown: continue
        check((A - shown[layer.name]).abs().max() < 1e-5, f'{layer.name}: not what the module shows')
        compared += 1
    in_place(net, x, layout)
    rows, left = sum(l.row for l in layout.layers), in_words(layout.left_out)
    return (f'{layout.grid[0]}×{layout.grid[1]}; {len(kept)} layers, {rows} with a class row, '
            f'{compared} compared' + (f'; left out: {left}' if left else ''))


def in_place(net, x, layout):
    "A changed quarter of the image changes the keys of the first layer most in its quarter."
    h, w = x.shape[-2:]
    plain, changed = torch.full_like(x[:1], .5), torch.full_like(x[:1], .5)
    changed[..., :h//4, w - w//4:] = x[:1, :, :h//4, :w//4] # upper right
    with torch.no_grad():
        a, b = (read_attention(net, i, AllRows(0), layout=layout).taken[0][0] for i in (plain, changed))
    d = layout.on_grid((a - b).abs().sum((1, 2)))[0]
    row, column = divmod(int(d.argmax()), d.shape[1])
    there = row < d.shape[0]/2 and column >= (d.shape[1] - 1)/2
    check(there, f'a change of the upper right is at {row, column}')


def same(a, b, said, tol=1e-4): check((a - b).abs().max() <= tol*b.abs().max().clamp(min=1e-9), said)


def agrees(loc, x, free):
    "Finite maps that do not depend on the batch, nor (`free`) on the class; those of class 1."
    every, raw = loc.raw(x, [list(range(5))]*2), loc.raw(x, 1)
    check(every.isfinite().all() and (raw.flatten(1).std(1) > 0).all(), 'no map')
    same(raw, every[:, 1], 'another map among several targets', 1e-3)
    same(loc.raw(x[1:], 1)[0], raw[1], 'another map in another batch', 1e-2)
    if free: same(every[:, 0], raw, 'a map that depends on the class')
    else: check(not torch.equal(every[:, 0], raw), 'the same map for another class')
    return raw


def whole(A, layer, P): # (B,n,n) of all tokens, those that a layer does not see stay
    "Attention (B,Nq,Nk) as a square matrix over P + hw tokens, and what of it is identity."
    B, n = len(A), P + A.shape[2] - layer.prefix
    full = torch.zeros(B, n, n)
    seen = [*range(layer.prefix), *range(P, n)]
    rows = [0] if layer.alone else seen
    for i, r in enumerate(rows): full[:, r, seen] = A[:, i]
    kept = torch.zeros(n)
    kept[[i for i in range(n) if i not in rows]] = 1
    return full, torch.diag(kept)


def by_matrices(net, x, of): # (B,h,w)
    "The class token's row of the product of all layers' matrices; `of` makes one of a layer's heads."
    layout = learn_attention(net, x)
    with torch.no_grad(): _, _, (kept,) = read_attention(net, x, KeptCalls(), layout=layout)
    P, R = max(1, *(l.prefix for l, _ in kept)), None
    for layer, call in kept:
        B, identity = of(layer, call, P)
        R = B + identity if R is None else (B + identity)@R
    return layout.on_grid(R[:, 0])


def class_attention(family, net, x):
    raw = agrees(ClassAttention(net), x, free=True)
    layout = learn_attention(net, x)
    with torch.no_grad(), written_out(net) as shown: net(x)
    late = layers_of(layout, 'rows')[-4:]
    if all(l.name in shown for l in late):
        rows = torch.stack([layout.on_grid(shown[l.name][:, :, 0]).mean(1) for l in late]).mean(0)
        same(raw, rows, 'not the mean of what the modules show')
    return f'{raw.shape[1]}×{raw.shape[2]}, mean of {len(late)} layers'


def rollout(family, net, x):
    def of(layer, call, P):
        full, identity = whole(call.rows().mean(1), layer, P)
        if layer.alone and not layer.prefix: return full, identity
        own = torch.eye(len(identity)) - identity
        return (full + own)/2, identity
    raw = agrees(Rollout(net), x, free=True)
    same(raw, by_matrices(net, x, of), 'not the product of the matrices')
    return f'{raw.shape[1]}×{raw.shape[2]}'


def attention_gradient(family, net, x):
    raw, layout = agrees(AttentionGradient(net), x, free=False), learn_attention(net, x)
    with written_out(net) as shown: net(x)[:, 1].sum().backward()
    if all(l.name in shown for l in layout.layers):
        def of(layer, call, P):
            A = shown[layer.name]
            n = P + layout.grid[0]*layout.grid[1]
            return whole((A*A.grad).relu().mean(1).detach(), layer, P)[0], torch.eye(n)
        if not any(l.alone and not l.prefix for l in layout.layers):
            same(raw, by_matrices(net, x, of), 'not the product of the matrices', 1e-3)
    return f'{raw.shape[1]}×{raw.shape[2]}'


def legrad(family, net, x):
    loc = LeGrad(net)
    raw = agrees(loc, x, free=False)
    asked = x[1:] if len(loc.logits) == 1 else x
    with torch.no_grad(): same(loc.logits, LeGrad(net).door(net, asked), 'other logits')
    last, layout = LeGrad(net, -1).raw(x, 1), learn_attention(net, x)
    name = layers_of(layout, 'patches')[-1].name
    with written_out(net) as shown: score = net(x)[:, 1].sum()
    if name in shown: # the last block's score is the net's
        G, = torch.autograd.grad(score, shown[name])
        same(last, layout.on_grid(G.relu().mean((1, 2))), 'not the gradient of the last layer', 1e-3)
    return f'{raw.shape[1]}×{raw.shape[2]}'


def lively(net, x):
    "The net with BatchNorms that have seen the images: else little of an untrained one reaches its end."
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.momentum = 1.
        if not m.weight.any(): m.weight.data.fill_(1.)
    if norms:
        with torch.no_grad(): net.train()(x)
    return net.eval(), x


CHECKS = dict(attention=attention, ClassAttention=class_attention, Rollout=rollout,
              AttentionGradient=attention_gradient, LeGrad=legrad)


def cell(what, family, net, x):
    "Verdict and reason of one cell."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return 'right', CHECKS[what](family, net, x)
    except Wrong as e: return 'wrong', str(e)
    except (ValueError, TypeError) as e: return 'refused', str(e).replace('\n', ' ')[:300]
    except Exception as e: return 'wrong', f'{type(e).__name__}: {e}'.replace('\n', ' ')[:300]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--families', nargs='+', choices=list(FAMILIES), metavar='NAME')
    p.add_argument('--what', nargs='+', choices=list(CHECKS), metavar='NAME')
    p.add_argument('--out', type=Path, metavar='CSV', default=results_folder()/'token_support.csv')
    a = p.parse_args()
    rows = Rows(a.out)
    done = {(r['family'], r['what']) for r in rows.read()}
    for family in a.families or FAMILIES:
        for what in a.what or CHECKS:
            if (family, what) in done and not a.families: continue
            verdict, reason = cell(what, family, *lively(*made(family)))
            row = dict(family=family, arch=FAMILIES[family][0], what=what, verdict=verdict, reason=reason)
            rows.add([row | origin('python tools/attention_support.py')], family=family, what=what)
            print(family, what, verdict, reason, sep=' · ', flush=True)


if __name__ == '__main__': main()
