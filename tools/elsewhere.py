"""A pretend accelerator on a machine without one: it counts what crosses between host and device.

Inside `with Elsewhere() as d`, `d.device` is a device whose tensors hold their numbers in main memory.
Everything runs as on the CPU and gives the same numbers, but what would make the host wait for a GPU is
written down with the line of code that asked for it: a number that is read (`.item()`, `bool(t)`,
`f'{t:.2f}'`), tensors that are copied either way, results whose size depends on numbers (`nonzero`, a mask as
an index), functions that CUDA checks on the host (`torch.equal`, `torch.linalg.eigh`). Tensors of both sides
in one operation are an error.

    with Elsewhere() as d:
        net, x = d.move(net), d.put(x)
        loc(x, 1)
    print(d.crossings)

The device is called 'lazy', because torch knows that name in every build and has nothing behind it. What a
GPU does by itself (allocations, kernels that wait) it does not know: `torch.cuda.set_sync_debug_mode` does.
"""
import copy
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import wsol_nb

NAME = 'lazy'
aten = torch.ops.aten
LIBRARY = str(Path(wsol_nb.__file__).parent)
THEIRS = ('torch', 'fastai', 'timm', 'torchvision', 'fastcore', 'fastprogress')

READS = {'_local_scalar_dense': 'read', 'equal': 'read', 'is_nonzero': 'read',
         'nonzero': 'size', 'masked_select': 'size', '_unique2': 'size', 'unique_dim': 'size',
         'unique_consecutive': 'size', 'repeat_interleave': 'size', 'bincount': 'size',
         '_linalg_eigh': 'check', '_linalg_svd': 'check', 'linalg_inv_ex': None, '_linalg_solve_ex': None}
MOVES = {'_to_copy', 'copy_'}
INDEXED = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index', '_unsafe_index_put'}


WAITS = 'read', 'size', 'check', 'to host', 'to device' # the host stops; not for what is 'sent'


class Crossing(NamedTuple):
    "One wait of the host, or one copy."
    kind: str # 'read', 'size', 'check', 'to host', 'to device', or 'sent': a copy that nobody waits for
    op: str
    where: str # file:function of the library that asked, or of whoever did
    line: int
    ours: bool # whether the library asked


def _asked_by():
    "The innermost line of the library on the stack, or of others where no library of theirs lies below it."
    last = None
    for f in reversed(traceback.extract_stack()):
        parts = Path(f.filename).parts
        if f.filename in (__file__, LIBRARY + '/devices.py'): continue # these do it for others
        theirs = next((t for t in THEIRS if t in parts and 'site-packages' in parts), None)
        if f.filename.startswith(LIBRARY):
            return f'{Path(f.filename).relative_to(LIBRARY).with_suffix("")}:{f.name}', f.lineno, True
        if theirs == 'torch': continue
        if theirs: return f'{theirs}:{f.name}', f.lineno, False
        last = last or (f'{Path(f.filename).name}:{f.name}', f.lineno, False)
    return last or ('?', 0, False)


class There(torch.Tensor):
    "A tensor of the pretend device; `near` holds its numbers."
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, t): return t # fastai would make one again of what has just come to the CPU

    @staticmethod
    def of(near):
        far = torch.Tensor._make_wrapper_subclass(
            There, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=NAME)
        far.near = near
        return far

    def __repr__(self, **kw): return f'There({self.near})'
    def __format__(self, spec): return format(self.item() if self.ndim == 0 else repr(self), spec)
    def tolist(self): return self.cpu().tolist()
    def numpy(self, **kw): raise TypeError("can't convert a tensor of the device to numpy, use Tensor.cpu()")
    def __array__(self, *args): return self.numpy()

    # what torch makes below the dispatcher, where no mode sees it
    def as_subclass(self, cls): return self # fastai's TensorBase adds nothing to numbers
    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device='cpu').to(self.device)
    def __getitem__(self, at): return super().__getitem__(_listed(at))
    def __setitem__(self, at, value): super().__setitem__(_listed(at), value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f'{func}: a tensor of the pretend device, outside of it')


def _listed(at):
    "An index whose sequences are tensors of this side, which torch copies to the device."
    if isinstance(at, tuple): return tuple(map(_listed, at))
    return torch.tensor(list(at)) if isinstance(at, (list, range)) else at


def _is_there(device): return device is not None and torch.device(device).type == NAME
def _near(a): return a.near if isinstance(a, There) else a


class _Made(TorchFunctionMode):
    "Tensors of numbers are made on this side and copied, as for a GPU."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        numbers = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if not numbers or not _is_there(kwargs.get('device')): return func(*args, **kwargs)
        device = kwargs.pop('device')
        return func(*args, **kwargs, device='cpu').to(device)


class Elsewhere(TorchDispatchMode):
    "The pretend device, while it is entered; `crossings` is what crossed."
    def __init__(self):
        super().__init__()
        self.device, self.crossings, self.on, self.made = torch.device(NAME), [], True, _Made()

    def __enter__(self):
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    # moving there, and looking from here, without being counted

    def put(self, t):
        "A tensor of this side as one of the device, with a gradient where it had one."
        far = There.of(t.detach())
        return far.requires_grad_() if t.requires_grad and t.is_leaf else far

    def move(self, module):
        "A copy of a module on the device."
        tensors = [*module.parameters(), *module.buffers()]
        memo = {id(t): nn.Parameter(There.of(t.detach().clone()), t.requires_grad)
                if isinstance(t, nn.Parameter) else There.of(t.detach().clone()) for t in tensors}
        return copy.deepcopy(module, memo)

    def look(self, t):
        "The numbers of a tensor, for a test."
        return t.near if isinstance(t, There) else t.detach()

    # what crossed

    def note(self, kind, op):
        if self.on: self.crossings.append(Crossing(kind, op, *_asked_by()))

    # every operation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        far = [t for t in tensors if isinstance(t, There)]
        asked = kwargs.get('device')
        if not far and not _is_there(asked): return func(*args, **kwargs)
        if asked is not None and _is_there(asked): kwargs['device'] = torch.device('cpu')
        there = _is_there(asked) if asked is not None else bool(far)
        if name in MOVES: self.moved(name, args, kwargs, asked)
        elif name in INDEXED: self.indexed(name, args)
        else: self.together(func, tensors, far)
        if READS.get(name): self.note(READS[name], name)
        return self.run(func, args, kwargs, there)

    def moved(self, name, args, kwargs, asked):
        "A copy within a device is none."
        asks_none = kwargs.get('non_blocking') or name == 'copy_' and args[2:] == (True,)
        if name == '_to_copy':
            of, to = isinstance(args[0], There), None if asked is None else _is_there(asked)
        else: to, of = isinstance(args[0], There), isinstance(args[1], There)
        if to is None or to == of: return
        self.note(('sent' if asks_none else 'to device') if to else 'to host', name)

    def indexed(self, name, args):
        "Masks as indices are counted through; indices of this side are copied."
        for i in args[1]:
            if i is None: continue
            if isinstance(args[0], There) and not isinstance(i, There): self.note('to device', name)
            if i.dtype in (torch.bool, torch.uint8): self.note('size', name)
        if isinstance(i, There) and not isinstance(args[0], There):
            raise RuntimeError('indices should be either on cpu or on the same device as the indexed tensor')
        if len(args) > 2 and isinstance(args[2], torch.Tensor) and not isinstance(args[2], There):
            if args[2].ndim: raise RuntimeError(f'{name}: expected all tensors to be on the same device')
            self.note('to device', name)

    def together(self, func, tensors, far):
        "Only a single number may come from this side."
        if not far: return
        lost = [t for t in tensors if not isinstance(t, There) and t.ndim]
        if lost:
            raise RuntimeError(f'{func}: expected all tensors to be on the same device, but found one of '
                               f'shape {tuple(lost[0].shape)} on the cpu beside {self.device}')

    def run(self, func, args, kwargs, there):
        known = {id(a.near): a for a in tree_flatten((args, kwargs))[0] if isinstance(a, There)}
        out = func(*tree_map(_near, args), **tree_map(_near, kwargs))

        def wrapped(o):
            if not isinstance(o, torch.Tensor): return o
            if id(o) in known: return known[id(o)] # in place
            return There.of(o) if there else o
        return tree_map(wrapped, out)

