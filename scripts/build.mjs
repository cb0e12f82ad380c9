// Builds everything: the native addon (build/tp_run.node) with CMake and the TypeScript (dist/).
// `node scripts/build.mjs [native|ts]`. Runs at `npm ci`; downloads nothing.

import { spawnSync } from 'node:child_process';
import { chmodSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const require = createRequire(import.meta.url);

/** Runs a tool with its output on stderr; ends this build when it fails. */
function run(command, args) {
  const done = spawnSync(command, args, { cwd: root, stdio: ['ignore', 2, 2] });
  if (done.status !== 0)
    stop(`${command} ${args.join(' ')} ended with ${done.error?.message ?? done.status ?? done.signal}`);
}

function stop(message) {
  console.error(`tp-run build: ${message}`);
  process.exit(1);
}

function has(command) {
  return spawnSync(command, ['--version'], { stdio: 'ignore' }).status === 0;
}

function buildNative() {
  const compiler = process.env.CXX ?? ['c++', 'g++', 'clang++'].find(has);
  const missing = [
    ...(has('cmake') ? [] : ['CMake 3.20 or newer']),
    ...(compiler && has(compiler) ? [] : ['a C++20 compiler']),
  ];
  if (missing.length > 0)
    stop(`${missing.join(' and ')} not found; on Debian or Ubuntu: apt-get install cmake g++ make`);
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  const headers = require('node-api-headers').include_dir;
  const addonApi = dirname(require.resolve('node-addon-api/package.json'));
  run('cmake', [
    ...['-S', '.', '-B', 'build', '-DCMAKE_BUILD_TYPE=Release'],
    `-DNODE_API_INCLUDE=${headers}`,
    `-DNODE_ADDON_API_INCLUDE=${addonApi}`,
    `-DTP_RUN_VERSION=${version}`,
  ]);
  run('cmake', ['--build', 'build', '--parallel', String(availableParallelism())]);
}

function buildTypeScript() {
  rmSync(join(root, 'dist'), { recursive: true, force: true });
  run(process.execPath, [require.resolve('typescript/bin/tsc'), '-p', 'tsconfig.build.json']);
  chmodSync(join(root, 'dist/cli/main.js'), 0o755);
}

const what = process.argv[2] ?? 'all';
if (what === 'all' || what === 'native') buildNative();
if (what === 'all' || what === 'ts') buildTypeScript();
