"""wsol_nb/_index.py from the source of the package: who is registered where, with what its decorator says,
and the front door.

Nothing is imported: decorators like `@localizer(passes='1', paper='…')` are read from the syntax tree, so
that the index can be made on a machine without torch, and before the package can be imported at all.
"""
import ast
import pprint
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# functions and classes of everyday, beside everything that is registered
DOOR = ['WSOLDataLoaders', 'wsol_learner', 'evaluate', 'Method', 'Localizer', 'Head', 'load_run', 'save_run',
        'score_run', 'LocalizationInterpretation', 'Report', 'Scorer', 'MapStore', 'LabelStore',
        'check_manifest', 'read_metadata', 'folder_manifest', 'write_world', 'score_maps',
        'write_maps', 'localize_all', 'wsol_model', 'load_body', 'sample_seeds', 'peak_responses',
        'level_boxes', 'map_boxes', 'contact_sheet', 'write_report', 'set_seed', 'sgd', 'adam',
        'adamw', 'fit_run', 'run_grid', 'read_results', 'dice_volumes', 'hd95']


def kinds():
    "`KINDS` of the registry, read and not imported."
    tree = ast.parse((root/'wsol_nb/registry.py').read_text(encoding='utf-8'))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign)]
    return next(ast.literal_eval(n.value) for n in assigned if ast.unparse(n.targets[0]) == 'KINDS')


KINDS = kinds()


def registered(tree):
    "(kind, name, docstring, facts) of the decorated classes and commands of a module."
    for node in tree.body:
        for d in getattr(node, 'decorator_list', []):
            if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id in KINDS:
                code = ast.Lambda, ast.Name # not told by a value
                literal = {k.arg: k.value for k in d.keywords
                           if not isinstance(k.value, code) and k.arg != 'examples'}
                doc = (ast.get_docstring(node) or '').split('\n')[0]
                yield d.func.id, node.name, doc, {k: ast.literal_eval(v) for k, v in literal.items()}


def render():
    "The text of the index."
    index, door = {k: {} for k in KINDS}, {}
    for file in sorted((root/'wsol_nb').rglob('*.py')):
        if file.name.startswith('_'): continue
        module = '.'.join(file.relative_to(root).with_suffix('').parts)
        tree = ast.parse(file.read_text(encoding='utf-8'))
        for kind, name, doc, facts in registered(tree):
            if name in index[kind]:
                raise SystemExit(f'{kind} {name}: both in {index[kind][name][0]} and in {module}')
            index[kind][name] = module, doc, facts
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        targets = (t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets)
        defined |= {t.id for t in targets if isinstance(t, ast.Name)}
        door |= {n: module for n in DOOR if n in defined}
    if lost := set(DOOR) - set(door):
        raise SystemExit(f'tools/index.py: {", ".join(sorted(lost))} is defined nowhere')
    show = lambda d: pprint.pformat(d, width=110)
    said = '"Made by tools/index.py from the decorators in the package; do not edit."'
    return f'{said}\n\nINDEX = {show(index)}\n\nDOOR = {show(door)}\n'


def write(): (root/'wsol_nb/_index.py').write_text(render(), encoding='utf-8')


if __name__ == '__main__': write()
