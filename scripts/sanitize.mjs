// `node scripts/sanitize.mjs address|thread [tests]`: builds the addon with the compiler's sanitizers and runs tests of
// native code with it. Works in a copy of the tree under build-address/ or build-thread/, so that a build in use stays as it is.

import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, symlinkSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const require = createRequire(import.meta.url);

/** Tests with engines in their own process: what a sanitizer can see. */
const ENGINE = [
  ...[
    'engine',
    'same-bits',
    'golden',
    'hidden',
    'sampling',
    'trace',
    'weights',
    'refusals',
    'burst',
    'replay',
  ],
].map((name) => `test/engine/${name}.test.ts`);

const KINDS = {
  // node itself never frees some of what it allocates: leaks of the addon cannot be told from its
  address: {
    flags: '-fsanitize=address,undefined -fno-sanitize-recover=undefined',
    runtime: 'libasan.so',
    env: { ASAN_OPTIONS: 'detect_leaks=0:abort_on_error=1', UBSAN_OPTIONS: 'print_stacktrace=1' },
    via: [],
    // engines of several ranks in one process, bad files and buffers, every op against its reference
    tests: ['test/ops', 'test/model/weights.test.ts', ...ENGINE],
  },
  thread: {
    flags: '-fsanitize=thread',
    runtime: 'libtsan.so',
    // node is not instrumented: reports need a frame of the addon to be about it
    env: { TSAN_OPTIONS: `halt_on_error=1:suppressions=${join(root, 'scripts/tsan.supp')}` },
    // its shadow memory wants addresses that are not drawn at random
    via: ['setarch', '-R'],
    // plain node: the threads that a test runner brings are not ours
    script: 'test/native/threads.mjs',
    // reading weights to a device, without one: a program of its own
    program: [
      'test/helpers/uploads-driver.cc',
      ...['native/engine/weights.cc', 'native/engine/uploads.cc', 'native/ops/cpu/thread_pool.cc'],
    ],
  },
};

const [name, ...words] = process.argv.slice(2);
const kind = KINDS[name];
if (!kind) stop('say address or thread');

const build = join(root, `build-${name}`);
const tree = join(build, 'tree');
rmSync(tree, { recursive: true, force: true });
mkdirSync(join(tree, 'build'), { recursive: true });
for (const part of [
  'src',
  'test',
  'configs',
  'dist',
  'scripts',
  'package.json',
  'vitest.config.ts',
  'tsconfig.json',
])
  cpSync(join(root, part), join(tree, part), { recursive: true });
symlinkSync(join(root, 'node_modules'), join(tree, 'node_modules'));

const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
run('cmake', [
  ...[
    '-S',
    root,
    '-B',
    build,
    '-DCMAKE_BUILD_TYPE=RelWithDebInfo',
    '-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g',
  ],
  `-DCMAKE_CXX_FLAGS=${kind.flags} -fno-omit-frame-pointer`,
  ...['-DTP_RUN_CUDA=OFF', `-DTP_RUN_VERSION=${version}`],
  `-DNODE_API_INCLUDE=${require('node-api-headers').include_dir}`,
  `-DNODE_ADDON_API_INCLUDE=${dirname(require.resolve('node-addon-api/package.json'))}`,
]);
run('cmake', ['--build', build, '--parallel', String(availableParallelism())]);
symlinkSync(join(build, 'tp_run.node'), join(tree, 'build', 'tp_run.node'));

const compiler = process.env.CXX ?? 'c++';
const library = spawnSync(compiler, [`-print-file-name=${kind.runtime}`], { encoding: 'utf8' }).stdout.trim();
if (!existsSync(library)) stop(`${compiler} has no ${kind.runtime}: install its sanitizer libraries`);
if (kind.program) {
  const binary = join(build, 'program');
  const flags = ['-std=c++20', '-O1', '-g', kind.flags, '-I', join(root, 'native'), '-pthread'];
  run(compiler, [...flags, ...kind.program, '-o', binary]);
  run(kind.via[0], [...kind.via.slice(1), binary], { env: { ...process.env, ...kind.env } });
}
const vitest = join(dirname(require.resolve('vitest/package.json')), 'vitest.mjs');
const tests = words.length > 0 ? words : kind.tests;
const program = kind.script
  ? [kind.script]
  : [vitest, 'run', '--pool=forks', '--testTimeout=600000', ...tests];
const [file, ...args] = [...kind.via, process.execPath, ...program];
run(file, args, { cwd: tree, env: { ...process.env, ...kind.env, LD_PRELOAD: library } });
console.log(`tp-run sanitize: ${name}: clean`);

function run(command, args, options = {}) {
  const done = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options });
  if (done.status !== 0) stop(`${command} ended with ${done.error?.message ?? done.status ?? done.signal}`);
}

function stop(message) {
  console.error(`tp-run sanitize: ${message}`);
  process.exit(1);
}
