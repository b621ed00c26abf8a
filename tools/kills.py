"""Kill commands at random moments (SIGKILL), call them again as their messages say, and look what is left.

    python tools/kills.py [N] [--seed S] [--at time|writes] [--cold] [--log FILE]

N kills, default 100, in turns of wsol_train, wsol_eval, wsol_localize and wsol_data import, on a small world.
A moment is drawn from the time that an undisturbed call takes, or, with `--at writes`, from its changes of
files (opened to write, renamed, removed, made): the process then ends right before one. Calls are forked from
this process, which has imported what they need, so that moments fall on their work; with `--cold` they are
processes of their own. With `--log` a call that was itself interrupted goes on after the last case of the
file. Exit status 1 where a case is wrong: a file that was whole is another, a part is left behind, a second
call ends in a traceback or does not say what to do, or what comes out at last is not what an undisturbed call
makes.
"""
import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

BIN = Path(sys.executable).parent
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg')
NET = ['--arch', 'test_resnet', '--pretrained', 'false', '--size', '64', '--bs', '8', '--no-check']


# What is called. Each job makes the folder of a case, names its first call, and says what it has made.

def train_place(base, here, rng):
    "Nothing yet, or a run of one epoch."
    if rng.random() < .5: shutil.copytree(base/'begun', here/'run')


def eval_place(base, here, rng):
    "A finished run, with the report of another call or without."
    shutil.copytree(base/'run', here/'run')
    if rng.random() < .5: shutil.copy(base/'old-report.json', here/'run/report-test.json')


def localize_place(base, here, rng):
    "A folder with a file of the user's."
    (here/'out').mkdir()
    (here/'out/mine.txt').write_text('mine')


def import_place(base, here, rng):
    "Nothing yet, or an import that is to be replaced."
    if rng.random() < .5: shutil.copytree(base/'old-import', here/'out')


def anew(base): return ['wsol_train', '--data', base/'world', '--out', 'run', '--epochs', 3, *NET]


def train_call(base, here):
    begun = (here/'run/checkpoint.pt').is_file()
    return ['wsol_train', '--out', 'run', '--resume'] if begun else anew(base)


def eval_call(base, here): return ['wsol_eval', 'run', '--bootstrap', 20, '--bs', 8]
def localize_call(base, here): return ['wsol_localize', base/'run', base/'world/SYNTH/test', '--out', 'out']


def import_call(base, here):
    over = ['--overwrite']*(here/'out').exists()
    return ['wsol_data', 'import', base/'voc', 'out', *over]


JOBS = dict(train=(train_place, train_call), eval=(eval_place, eval_call),
            localize=(localize_place, localize_call), **{'import': (import_place, import_call)})


# What must stay, and what must come out

PASSING = ('seconds', 'hardware', 'versions') # differ from call to call


def steady(o):
    "A nested value without what differs from call to call."
    if isinstance(o, dict): return {k: steady(v) for k, v in o.items() if k not in PASSING}
    return [steady(v) for v in o] if isinstance(o, list) else o


def content(file):
    "What a file says, as a short text; 'damaged' where it cannot be read."
    data = file.read_bytes()
    if file.suffix == '.json':
        try: data = json.dumps(steady(json.loads(data)), sort_keys=True).encode()
        except ValueError: return 'damaged'
    if file.suffix == '.html': return 'whole' if data.rstrip().endswith(b'</html>') else 'damaged'
    if file.suffix == '.pt': return 'a checkpoint'
    return hashlib.sha256(data).hexdigest()[:12]


def contents(folder):
    "{file: what it says} of all that lies below a folder, but for locks, which the system lets go."
    files = (p for p in folder.rglob('*') if p.is_file() and p.name not in ('.lock', '.holder.json'))
    return {p.relative_to(folder).as_posix(): content(p) for p in files}


def lost(before, after, new):
    "Files of `before` that are neither as they were nor as an undisturbed call makes them."
    return [f for f, what in before.items() if after.get(f) not in (what, new.get(f, what))]


def epochs(run):
    "Finished epochs that a run folder says."
    file = run/'history.csv'
    return len(file.read_text().splitlines()) - 1 if file.is_file() else 0


def lost_by(job, before, here, base, new):
    "What a kill has taken from what was whole."
    after = contents(here)
    if job == 'train': # each epoch writes them anew
        kept = {f: w for f, w in before.items() if f in ('run/checkpoint.pt',)}
        fewer = ['an epoch']*(epochs(here/'run') < bool(before))
        return lost(kept, after, new) + fewer + [f for f, w in after.items() if w == 'damaged']
    if job == 'import': # the folder may be aside for a moment, the next call puts it back
        aside = next(iter(here.glob('.out.*.old')), None)
        if aside and not (here/'out').exists(): after = {f'out/{f}': w for f, w in contents(aside).items()}
        whole = {f: w for f, w in after.items() if f.startswith('out/')}
        return [] if whole in (before, {f: w for f, w in new.items() if f.startswith('out/')}) else ['out']
    return lost(before, after, new) + [f for f, w in after.items() if w == 'damaged' and '.part' not in f]


# Calls

CHANGES = 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.link', 'os.symlink', 'os.truncate'


def watch(here, log, n):
    "Note each change of a file below a folder, and end before the `n`th (0: never)."
    seen, log = [0], open(log, 'w')

    def hook(event, given):
        named = given and isinstance(given[0], (str, bytes, os.PathLike))
        path = os.path.abspath(os.fsdecode(given[0])) if named else ''
        opened = event == 'open' and given[2] & (os.O_WRONLY | os.O_RDWR)
        if not path.startswith(str(here)) or not (opened or event in CHANGES): return
        seen[0] += 1
        print(event, os.path.relpath(path, here), file=log, flush=True)
        if seen[0] == n: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def work(args, here, at=None):
    "Run a command in this process; `at`: see `watch`."
    from wsol_nb.cli.command import main as run
    os.chdir(here)
    if at is not None: watch(here, here.with_suffix('.changes'), at)
    sys.argv = [str(BIN/args[0]), *map(str, args[1:])]
    run()


def forked(args, here, at=None):
    "The id of a process that runs a command; what it prints goes into a file beside its folder."
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setsid()
        said = os.open(here.with_suffix('.said'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2): os.dup2(said, stream)
        work(args, here, at)
        code = 0
    except SystemExit as e:
        code = int(bool(e.code))
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def cold(args, here, at=None):
    "The same in a process of its own; there is no `at`."
    with open(here.with_suffix('.said'), 'w') as said:
        return subprocess.Popen([*map(str, [BIN/args[0], *args[1:]])], cwd=here, stdout=said, stderr=said,
                                start_new_session=True).pid


def wait(pid, seconds=600):
    "The exit status of a process, which is killed after some seconds; that is -9."
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            try: os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError: os.kill(pid, signal.SIGKILL) # it has no group of its own yet
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(.002)


begin = forked


def call(args, here):
    "A call that is left alone; (exit status, what it printed)."
    return wait(begin(args, here)), here.with_suffix('.said').read_text(errors='replace')


def changes(args, here, n):
    "A call that ends before its `n`th change; (exit status, the changes)."
    code = wait(forked(args, here, n))
    return code, here.with_suffix('.changes').read_text().splitlines()


def import_all():
    "Everything that a call imports, so that it need not."
    import wsol_nb
    for module in pkgutil.walk_packages(wsol_nb.__path__, 'wsol_nb.'): importlib.import_module(module.name)
    for module in ('fastai.vision.all', 'pandas', 'matplotlib.pyplot'): importlib.import_module(module)


ADVICE = '--resume', '--overwrite'


def follow(args, said):
    "The call that a refusal proposes, or None."
    if 'without --resume' in said: return 'without --resume'
    return next((a for a in ADVICE if a in said and a not in args), None)


def again(job, args, base, here, rng):
    "Call until it ends well; (what happened, what was said, what is wrong)."
    said_all, resume = [], ['wsol_train', '--out', 'run', '--resume']
    if job == 'train' and rng.random() < .5: args = resume
    for _ in range(3):
        code, said = call(args, here)
        if not code: return 'said' if said_all else 'went on', said_all, ''
        line = said.strip().splitlines()[-1]
        if 'Traceback' in said: return 'wrong', said_all, said[-1500:]
        advice = follow(args, line)
        said_all.append(line)
        if not advice: return 'wrong', said_all, f'does not say what to do: {line}'
        args = anew(base) if advice == 'without --resume' else [*args, advice]
    return 'wrong', said_all, 'its advice leads nowhere'


# Cases

def prepare(base):
    "The world, its export, a finished run and one that is begun, a report and an import to be replaced."
    for args in (
        ['wsol_data', 'synth', 'world', '--n-train', 16, '--n-val', 8, '--n-test', 16],
        ['wsol_data', 'export', 'world', 'voc', '--format', 'voc'],
        ['wsol_data', 'import', 'voc', 'old-import', '--valid-pct', .4, '--no-masks'],
        ['wsol_train', '--data', 'world', '--out', 'run', '--epochs', 3, *NET],
        ['wsol_eval', 'run', '--bootstrap', 10, '--out', 'other']):
        code, said = call(args, base)
        if code: sys.exit(f'{args}: {said}')
    shutil.copy(base/'other/report-test.json', base/'old-report.json')
    begun = [a if a != 'run' else 'begun' for a in anew(base)]
    pid = forked(begun, base)
    while not (base/'begun/checkpoint.pt').is_file(): time.sleep(.001)
    wait(pid, 0)


def undisturbed(job, base, here, by_writes, start):
    "What a job makes when it is let alone: (seconds or changes, contents)."
    place, make = JOBS[job]
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    place(base, here, start)
    args = make(base, here)
    if by_writes: return len(changes(args, here, 0)[1]), contents(here)
    began = time.time()
    code, said = call(args, here)
    if code: sys.exit(f'{args}: {said}')
    return time.time() - began, contents(here)


class Start:
    "Stands for a Random that chooses how a case begins."
    def __init__(self, value): self.value = value
    def random(self): return self.value


def one(i, seed, base, by_writes, usual):
    "A case: what is killed when, what came, what is wrong."
    rng, job = random.Random(f'{seed}/{i}'), [*JOBS][i % len(JOBS)]
    start, here = rng.choice([.1, .9]), base/f'case{i}'
    length, new = usual(job, start)
    place, make = JOBS[job]
    moment = rng.randint(1, max(1, length)) if by_writes else rng.uniform(0, length)
    for _ in range(3): # the call may have been done before
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        place(base, here, Start(start))
        before, args = contents(here), make(base, here)
        if by_writes:
            code, made = changes(args, here, moment)
            said_moment = f'change {moment}, {made[-1]}'
        else: code, said_moment = wait(begin(args, here), moment), f'{moment:.2f} s'
        hit = code == -signal.SIGKILL
        if hit: break
        moment = rng.randint(1, moment) if by_writes else rng.uniform(0, moment)
    gone = lost_by(job, before, here, base, new)
    came, said, wrong = again(job, args, base, here, rng)
    now = contents(here)
    other = [] if wrong else sorted(f for f in now.keys() | new.keys() if now.get(f) != new.get(f))
    if gone: wrong = f'lost by the kill: {gone}; {wrong}'
    if other: wrong += f'other than undisturbed: {other[:5]}'
    if not wrong: shutil.rmtree(here)
    came = 'wrong' if wrong else came
    return dict(case=i, job=job, moment=said_moment, hit=hit, came=came, said=said, wrong=wrong)


def table(rows):
    "How often each command was killed and what came of it."
    count = Counter((r['job'], what) for r in rows for what in ('kills', r['came']))
    print(f'{"command":10}{"kills":>7}{"went on":>9}{"said what to do":>17}{"wrong":>7}')
    for job in (*JOBS, 'all'):
        of = JOBS if job == 'all' else [job]
        n = [sum(count[j, w] for j in of) for w in ('kills', 'went on', 'said', 'wrong')]
        print(f'{job:10}{n[0]:7}{n[1]:9}{n[2]:17}{n[3]:7}')
    lines = Counter(re.sub(r'[\w./-]*/', '', s) for r in rows for s in r['said'])
    for line, n in lines.most_common(): print(f'{n:4} × {line}')


def rows_of(log):
    "The cases that a log has."
    return [json.loads(line) for line in log.read_text().splitlines()] if log and log.is_file() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('n', nargs='?', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--at', choices=['time', 'writes'], default='time')
    parser.add_argument('--cold', action='store_true', help='processes of their own')
    parser.add_argument('--log', type=Path, help='a line a case; what stands there is not done again')
    given = parser.parse_args()
    if given.cold: globals()['begin'] = cold
    rows, by_writes = rows_of(given.log), given.at == 'writes'
    left = [i for i in range(given.n) if i not in {r['case'] for r in rows}]
    import_all()
    with tempfile.TemporaryDirectory() as tmp:
        base = Path(tmp).resolve()
        prepare(base)
        usual = cache(lambda job, start: undisturbed(job, base, base/'alone', by_writes, Start(start)))
        for i in left:
            rows.append(r := one(i, given.seed, base, by_writes, usual))
            if r['wrong']: print(f"case {i}, {r['job']} at {r['moment']}: {r['wrong']}", flush=True)
            if given.log:
                with open(given.log, 'a') as f: print(json.dumps(r), file=f)
    table(rows)
    sys.exit(any(r['wrong'] for r in rows))


if __name__ == '__main__': main()
