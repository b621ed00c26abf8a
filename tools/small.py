"""A registered method at its smallest, for tests and for trials of a machine."""
from wsol_nb.registry import entries


def two_stages(name)->bool: return entries('method')[name].facts.get('stages') == 2


def small_fields(name)->dict:
    "What a method's registration says it needs to be small: `small=((field, value), …)`."
    return dict(entries('method')[name].facts.get('small', ()))


def small_arch(name, arch='resnet10t', stride=16)->dict:
    "Architecture and stride: the method's own, `small_arch=(arch, stride)`, where it cannot have any."
    arch, stride = entries('method')[name].facts.get('small_arch', (arch, stride))
    return dict(arch=arch, stride=stride)
