import warnings

__version__ = "0.1.0"

# fastai compiles a layer with it when it is imported, and today's torch warns of that: nothing that a user can mend
warnings.filterwarnings('ignore', '`torch.jit.script` is', FutureWarning)


def __getattr__(name): # the front door, see wsol_nb.registry
    if name.startswith('_'): raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from wsol_nb.registry import open_door
    return open_door(name)


def __dir__():
    from wsol_nb.registry import at_the_door
    return sorted({*globals(), *at_the_door()})
