// `node scripts/simt.mjs [--seeds N] [--seed S] [--undefined] [parts]`: builds the CUDA kernels for the host with the
// emulator of test/native/simt, and runs their checks under N seeds (docs/simt.md). Needs neither nvcc nor a GPU.

import { spawn, spawnSync } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');

/** The checks, the longest first: they share the cores. */
export const PARTS = ['many', 'stages', 'stretches', 'ranks', 'ops', 'peers'];

/** Why this machine cannot run it, or nothing. */
export function obstacle() {
  return process.platform === 'linux' && process.arch === 'x64'
    ? undefined
    : `the emulator switches threads in x86-64 code for Linux, this is ${process.platform} ${process.arch}`;
}

/** Builds and returns the folder of the programs. Throws what the build said. */
export function build({ undefinedBehaviour = false } = {}) {
  const folder = join(root, undefinedBehaviour ? 'build-simt-undefined' : 'build-simt');
  for (const args of [
    [
      '-S',
      join(root, 'test/native/simt'),
      '-B',
      folder,
      `-DSIMT_UNDEFINED=${undefinedBehaviour ? 'ON' : 'OFF'}`,
    ],
    ['--build', folder, '--parallel', String(availableParallelism())],
  ]) {
    const done = spawnSync('cmake', args, { encoding: 'utf8', maxBuffer: 1 << 28 });
    if (done.status !== 0)
      throw new Error(`cmake ${args.join(' ')}\n${done.error ?? ''}${done.stdout}${done.stderr}`);
  }
  return folder;
}

/** Runs a program to its end: { status, output }. */
export function run(program, args) {
  return new Promise((resolve) => {
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    for (const stream of [child.stdout, child.stderr])
      stream.setEncoding('utf8').on('data', (text) => {
        output += text;
      });
    child.on('error', (error) => resolve({ status: -1, output: String(error) }));
    child.on('close', (status, signal) => resolve({ status: signal ?? status, output }));
  });
}

/** Runs jobs, `together` at a time. */
export async function share(jobs, together) {
  const left = [...jobs];
  const worker = async () => {
    for (let job = left.shift(); job; job = left.shift()) await job();
  };
  await Promise.all(Array.from({ length: together }, worker));
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { seeds: { type: 'string' }, seed: { type: 'string' }, undefined: { type: 'boolean' } },
  });
  const why = obstacle();
  if (why) {
    console.error(`tp-run simt: ${why}`);
    process.exit(2);
  }
  const folder = build({ undefinedBehaviour: values.undefined });
  const seeds = values.seed
    ? [values.seed]
    : Array.from({ length: Number(values.seeds ?? 8) }, () => String(randomInt(1, 2 ** 31)));
  const jobs = [['simt_selftest', []]];
  for (const seed of seeds)
    for (const part of positionals.length > 0 ? positionals : PARTS) jobs.push(['simt_check', [part, seed]]);
  let failed = 0;
  await share(
    jobs.map(([program, args]) => async () => {
      const { status, output } = await run(join(folder, program), args);
      if (status !== 0) failed++;
      console.log(
        status === 0 ? output.trim().split('\n').at(-1) : `${output}\n${args.join(' ')}: ${status}`,
      );
    }),
    availableParallelism(),
  );
  console.log(`tp-run simt: ${jobs.length} runs, ${failed} failed`);
  process.exitCode = failed ? 1 : 0;
}
