import importlib.abc
import sys
import warnings

__version__ = "0.1.0"

# fastai compiles a layer with it when it is imported, and today's torch warns of that: nothing that a user can mend
warnings.filterwarnings('ignore', '`torch.jit.script` is', FutureWarning)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    "torchvision of another build than torch's needs what `core` declares, see its end."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != 'torchvision' or cls not in sys.meta_path: return None
        sys.meta_path.remove(cls)
        import wsol_nb.core
        return None # others find it


sys.meta_path.insert(0, _BeforeTorchvision)


def __getattr__(name): # the front door, see wsol_nb.registry
    if name.startswith('_'): raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from wsol_nb.registry import open_door
    return open_door(name)


def __dir__():
    from wsol_nb.registry import at_the_door
    return sorted({*globals(), *at_the_door()})
