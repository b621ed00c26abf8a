"""The built site as a browser shows it: python tools/look.py [PAGE …] [--shots FOLDER]

In headless Chromium each page of _docs is opened 1280 pixels wide, where no line of code may be cut or
broken, and 400 wide, where the page must not be wider than its window. The exit status is 1 where one is.
`--shots` keeps pictures of the pages.
"""
import argparse
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket

root = Path(__file__).resolve().parent.parent
WIDE, NARROW = 1280, 400 # pixels
# Lines of code that do not fit: wider than their box, or broken into two.
CUT = """[...document.querySelectorAll('pre')].filter(p => p.offsetParent).flatMap(p => {
  const lines = p.querySelectorAll('code > span[id]');
  const high = parseFloat(getComputedStyle(p).lineHeight) * 1.6 || 30;
  const broken = [...lines].filter(l => l.getBoundingClientRect().height > high);
  if (p.scrollWidth > p.clientWidth + 1 && lines.length) broken.push(p);
  return broken.map(l => l.textContent.trim().slice(0, 60))})"""
# What sticks out of the window to the right, unless a box of its own scrolls it.
OUT = """(() => {
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= wide) return [];
  const scrolls = e => e && (getComputedStyle(e).overflowX != 'visible' || scrolls(e.parentElement));
  const sticks = e => e.getBoundingClientRect().right > wide + 1 && !scrolls(e.parentElement);
  const named = e => e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 40);
  const out = [...document.querySelectorAll('body *')].filter(sticks).slice(0, 3).map(named);
  return ['page ' + document.documentElement.scrollWidth, ...out]})()"""


class Browser:
    "One tab of a headless Chromium, spoken to by its DevTools protocol."
    def __init__(self, program, profile):
        flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0',
                 '--remote-allow-origins=*']
        self.process = subprocess.Popen([program, *flags, f'--user-data-dir={profile}', 'about:blank'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = Path(profile)/'DevToolsActivePort'
        for _ in range(600): # a minute at most
            if port.exists() and port.read_text().strip(): break
            time.sleep(.1)
        number = port.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f'http://127.0.0.1:{number}/json'))
        tab = next(t for t in tabs if t['type'] == 'page')
        self.socket = websocket.create_connection(tab['webSocketDebuggerUrl'], timeout=60)
        self.ids = itertools.count(1)
        self.ask('Page.enable')

    def ask(self, method, **params):
        "The answer to a command; events that come before it are passed over."
        number = next(self.ids)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while (said := json.loads(self.socket.recv())).get('id') != number: pass
        return said.get('result', {})

    def open(self, page, width):
        window = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask('Emulation.setDeviceMetricsOverride', **window)
        self.ask('Page.navigate', url=page.as_uri())
        for _ in range(100):
            if self.value('document.readyState') == 'complete': break
            time.sleep(.05)
        time.sleep(.2) # scripts of the page

    def value(self, expression):
        said = self.ask('Runtime.evaluate', expression=expression, returnByValue=True)
        return said.get('result', {}).get('value')

    def picture(self, file):
        high = min(self.value('document.documentElement.scrollHeight'), 12000)
        clip = dict(x=0, y=0, width=self.value('window.innerWidth'), height=high, scale=1)
        made = self.ask('Page.captureScreenshot', format='png', captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(made['data']))

    def close(self):
        self.process.terminate()
        self.process.wait()


def faults(browser, page, shots):
    "What a reader of this page would stumble over."
    for width, ask, what in ((WIDE, CUT, 'code does not fit'), (NARROW, OUT, 'wider than the window')):
        browser.open(page, width)
        found = browser.value(ask)
        if found: yield f'{page.parent.name}/{page.name} at {width} px: {what} ({len(found)}): {found[:3]}'
        if shots: browser.picture(shots/f'{page.stem}-{width}.png')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('pages', nargs='*', type=Path)
    p.add_argument('--shots', type=Path)
    a = p.parse_args()
    program = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if program is None: sys.exit('look: Chromium is not installed')
    pages = [q.resolve() for q in a.pages] or sorted((root/'_docs').rglob('*.html'))
    if not pages or not all(q.is_file() for q in pages):
        sys.exit('look: _docs has no pages; run make docs with quarto')
    if a.shots: a.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        with contextlib.closing(Browser(program, profile)) as browser:
            found = [f for page in pages for f in faults(browser, page, a.shots)]
    said = f'{len(pages)} pages looked at {WIDE} and {NARROW} px wide: {len(found)} faults'
    print('\n'.join([*found, said]))
    sys.exit(bool(found))


if __name__ == '__main__': main()
