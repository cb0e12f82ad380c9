// Packs everything that a GPU node without network needs into one archive: the Node runtime that runs this script,
// the addon, dist/, configs/ and the production packages. `npm run bundle [out.tar.gz]`; see launch/bundle.md.

import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const MOST_MIB = 60;
/** What `npm run test:gpu` and `npm run bench` are: they run with nothing but the bundled Node. */
const GPU_SCRIPTS = [
  'test/gpu',
  'test/bench/run.mjs',
  'test/bench/markdown.mjs',
  'test/fixtures',
  'scripts/soak.mjs',
];
const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const out = resolve(
  process.argv[2] ?? join(root, '.bundle', `tp-run-${process.platform}-${process.arch}.tar.gz`),
);

for (const needed of ['dist/cli/main.js', 'build/tp_run.node'])
  if (!existsSync(join(root, needed))) {
    console.error(`tp-run bundle: ${needed} is missing; run npm ci first`);
    process.exit(1);
  }

const stage = mkdtempSync(join(tmpdir(), 'tp-run-bundle-'));
const home = join(stage, 'tp-run');
try {
  mkdirSync(join(home, 'bin'), { recursive: true });
  mkdirSync(join(home, 'build'));
  cpSync(process.execPath, join(home, 'bin/node'), { dereference: true });
  execFileSync('strip', ['--strip-debug', join(home, 'bin/node')], { stdio: 'ignore' });
  cpSync(join(root, 'build/tp_run.node'), join(home, 'build/tp_run.node'));
  for (const part of ['dist', 'configs', 'package.json', 'README.md', 'LICENSE', ...GPU_SCRIPTS])
    cpSync(join(root, part), join(home, part), { recursive: true });
  writeFileSync(join(home, 'commit.json'), `${JSON.stringify(commitHere())}\n`);
  for (const path of productionPackages())
    cpSync(path, join(home, relative(root, path)), { recursive: true, filter: wanted });
  writeFileSync(join(home, 'tp-run'), LAUNCHER());
  chmodSync(join(home, 'tp-run'), 0o755);
  mkdirSync(dirname(out), { recursive: true });
  execFileSync('tar', ['-C', stage, '-I', 'gzip -9', '-cf', out, 'tp-run']);
} finally {
  rmSync(stage, { recursive: true, force: true });
}
const mib = statSync(out).size / 2 ** 20;
console.log(`${relative(process.cwd(), out)}: ${mib.toFixed(1)} MiB`);
if (mib > MOST_MIB) {
  console.error(`tp-run bundle: more than ${MOST_MIB} MiB`);
  process.exit(1);
}

/** The commit that results of this bundle name, and whether tracked files differ from it. */
function commitHere() {
  const git = (...words) => execFileSync('git', words, { cwd: root, encoding: 'utf8' }).trim();
  try {
    const dirty = git('status', '--porcelain', '--untracked-files=no') !== '';
    return { commit: git('rev-parse', '--short=12', 'HEAD'), dirty };
  } catch {
    return { commit: null, dirty: null };
  }
}

/** Folders of all production packages, as npm resolved them. */
function productionPackages() {
  const list = execFileSync('npm', ['ls', '--omit=dev', '--parseable', '--all'], {
    cwd: root,
    encoding: 'utf8',
  });
  return list
    .trim()
    .split('\n')
    .filter((path) => path !== root);
}

/** Leaves out what only a build needs, and other systems' binaries. */
function wanted(path) {
  const inside = relative(root, path);
  if (/\/node-addon-api(\/|$)/.test(`/${inside}`)) return false;
  const zeromq = /zeromq\/build\/([a-z0-9]+)(?:\/([a-z0-9]+))?/.exec(inside);
  if (!zeromq) return !/\.(map|md|cc|h|hpp)$/.test(inside);
  const [, platform, arch] = zeromq;
  return (platform === 'manifest' || platform === process.platform) && (!arch || arch === process.arch);
}

function LAUNCHER() {
  return '#!/bin/sh\nhome=$(dirname "$(readlink -f "$0")")\nexec "$home/bin/node" "$home/dist/cli/main.js" "$@"\n';
}
