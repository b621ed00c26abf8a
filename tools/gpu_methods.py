"""A few steps of every registered method in float16, in bfloat16 and compiled: finite, and resumed"""
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch
from gpu_kit import peak_mb
from small import small_arch, small_fields, two_stages

from wsol_nb.data.loaders import WSOLDataLoaders
from wsol_nb.localize.base import unwrap
from wsol_nb.registry import entries
from wsol_nb.train.checkpoint import Checkpoint, resume
from wsol_nb.train.learner import wsol_learner
from wsol_nb.train.run import save_run
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision

# 'fp16' and 'bf16' are fastai's to_fp16 and to_bf16
HOW = ('fp16', 'bf16', 'compiled')
BS = 8


class Mixed(MixedPrecision):
    "fastai's, which casts on CUDA only, on any device."
    def before_fit(self):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # there is no CUDA, says torch
            super().before_fit()
        kind = torch.device(self.dls.device).type
        if kind == 'cuda': return
        half = torch.float16 if self.amp_mode == AMPMode.FP16 else torch.bfloat16
        self.autocast = torch.autocast(kind, half)
        self.learn.scaler = torch.amp.GradScaler(kind, enabled=half == torch.float16)


class Watch(Callback):
    "Keeps each loss, the checkpoint of the first epoch, the number of steps taken: float16 may skip some."
    order = Checkpoint.order + 1
    def __init__(self, keep=None): self.keep, self.losses, self.taken = keep, [], 0
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.detach())
    def after_step(self): self.taken += 1
    def after_epoch(self):
        if self.keep and self.epoch == 0:
            self.keep.mkdir()
            shutil.copy(self.learn.path/'checkpoint.pt', self.keep)


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)


class Trial:
    "A world, a trained classifier for methods of two stages, and learners on them."
    def __init__(self, part, place):
        self.part, self.place = part, Path(place)
        self.steps, size = (2, 32) if part.quick else (4, 64) # in an epoch, side of the images
        counts = dict(n_train=self.steps*BS, n_val=BS, n_test=BS, progress=False)
        how = dict(size=size, resize=size, bs=BS, device=part.device, num_workers=0)
        self.dls = WSOLDataLoaders.from_synth(self.place/'world', world_kw=counts, **how)
        gap = entries('method')['GAP'].load()()
        first = wsol_learner(self.dls, 'test_resnet', gap, stride=8, localization=False, path=self.place)
        fit(first, 1)
        self.stage1 = save_run(first, self.place/'stage1')

    def learner(self, entry, how, path, watch):
        "A learner of a method, in a precision or compiled."
        second = two_stages(entry.name)
        first = dict(stage1=self.stage1) if second else {}
        method = entry.load()(**first, **small_fields(entry.name))
        net = {} if second else small_arch(entry.name, 'test_resnet', 8)
        learn = wsol_learner(self.dls, method=method, localization=False, path=path,
                             cbs=[Checkpoint(path), watch], **net)
        learn.to(self.part.device)
        if how in ('fp16', 'bf16'): learn.add_cb(Mixed(how))
        backend = 'eager' if self.part.quick else 'inductor' # quick: traced only
        if how == 'compiled': learn.model = torch.compile(learn.model, backend=backend)
        return learn, f'compiled ({backend})' if how == 'compiled' else how

    def run(self, entry, how):
        "Two epochs; then the second again, from the checkpoint of the first, by a new learner."
        own = self.place/f'{entry.name}-{how}'
        watch, again, start = Watch(own/'first'), Watch(), time.time()
        learn, said = self.learner(entry, how, own, watch)
        peak = peak_mb(lambda: fit(learn), self.part.device) if self.part.cuda else None
        if not self.part.cuda: fit(learn)
        took = time.time() - start
        other, _ = self.learner(entry, None if how == 'compiled' else how, own/'first', again)
        done = resume(other, own/'first')
        fit(other)
        self.tell(entry.name, said, learn, other, watch, again, done, took, peak)

    def tell(self, name, how, learn, other, watch, again, done, took, peak):
        "The row, and what is wrong in it."
        losses = torch.stack(watch.losses + again.losses)
        weights = [torch.cat([p.detach().float().flatten() for p in unwrap(l.model).parameters()])
                   for l in (learn, other)]
        finite = bool(losses.isfinite().all()) and all(bool(w.isfinite().all()) for w in weights)
        off = ((weights[0] - weights[1]).norm()/weights[0].norm()).item()
        resumed = done == 1 and len(again.losses) == self.steps
        self.part.add(method=name, how=how, steps=len(watch.losses), taken=watch.taken,
                      first_loss=losses[0].item(), last_loss=watch.losses[-1].item(), finite=finite,
                      resumed=resumed, difference_after_resuming=off, seconds=round(took, 2),
                      peak_mb=None if peak is None else round(peak, 1))
        if not finite: self.part.failed.append(f'{name}, {how}: a loss or a weight is not finite')
        if not resumed: self.part.failed.append(f'{name}, {how}: did not go on from its checkpoint')


def methods(part):
    "All in half precision first, then compiled, which takes longer."
    with tempfile.TemporaryDirectory() as place:
        trial, known = Trial(part, place), entries('method').values()
        jobs = [(e, how) for e in known for how in HOW[:2]] + [(e, HOW[2]) for e in known]
        for entry, how in part.each(jobs, name=lambda job: f'{job[0].name}, {job[1]}'):
            torch.compiler.reset()
            with part.guard(f'{entry.name}, {how}'): trial.run(entry, how)
            torch.set_autocast_enabled(torch.device(part.device).type, False) # an error leaves it on
            torch.clear_autocast_cache()
