// `node scripts/soak.mjs [--minutes 30] [--gpus 4] [more words for tp-run]`: one run that decodes without end; watches memory and
// descriptors of the launcher and of every rank. Ends with 1 when one of them grows. Needs dist/.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** More growth than this is a leak, in MiB an hour and process: an allocator breathes by a few. */
const MOST_GROWTH = 32;
const EVERY_MS = 5000;
/** What the launcher keeps of a token that it has printed, and no more. */
const BYTES_A_TOKEN = 400;

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const words = process.argv.slice(2);
const take = (name, fallback) => {
  const at = words.indexOf(name);
  return at < 0 ? fallback : words.splice(at, 2)[1];
};
const minutes = Number(take('--minutes', 30));
const gpus = take('--gpus', '4');

const folder = mkdtempSync(join(tmpdir(), 'tp-run-soak-'));
const prompts = join(folder, 'prompts.jsonl');
// short ones, so that sequences come and go all the time; more than any soak gets through
writeFileSync(
  prompts,
  Array.from({ length: 200_000 }, (_, i) => `{"prompt_ids":[2,${i % 1000}]}\n`).join(''),
);
const run = spawn(
  process.execPath,
  [
    ...[
      join(root, 'dist/cli/main.js'),
      '--gpus',
      gpus,
      '--prompts',
      prompts,
      '--max-tokens',
      '64',
      '--ignore-eos',
    ],
    ...['--batch', '4', ...words],
  ],
  { stdio: ['ignore', 'pipe', 'inherit'] },
);
let bytes = 0;
run.stdout.on('data', (chunk) => {
  bytes += chunk.length;
});
run.once('exit', (code) => {
  console.log(`soak: the run ended with ${code} before its time`);
  process.exit(1);
});

/** By process: [seconds, MiB, descriptors]. */
const samples = new Map();
while (bytes === 0) await new Promise((done) => setTimeout(done, 200)); // it loads
const started = performance.now();
while (performance.now() - started < minutes * 60_000) {
  const children = readFileSync(`/proc/${run.pid}/task/${run.pid}/children`, 'utf8')
    .split(' ')
    .filter(Boolean);
  for (const [i, pid] of [run.pid, ...children].entries()) {
    const name = i === 0 ? 'launcher' : `rank ${i - 1}`;
    const mib = Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))[1]) / 1024;
    const descriptors = readdirSync(`/proc/${pid}/fd`).length;
    samples.set(name, [
      ...(samples.get(name) ?? []),
      [(performance.now() - started) / 1000, mib, descriptors],
    ]);
  }
  await new Promise((done) => setTimeout(done, EVERY_MS));
}
run.removeAllListeners('exit');
run.kill('SIGINT');
await once(run, 'exit');
rmSync(folder, { recursive: true });

// `generate` keeps what it printed, for its summary: a few numbers a token
const hours = (performance.now() - started) / 3_600_000;
const kept = ((bytes / 4) * BYTES_A_TOKEN) / 2 ** 20 / hours;
let good = true;
console.log(`soak: ${minutes} minutes, ${gpus} ranks, ${(bytes / 2 ** 20).toFixed(1)} MiB of tokens printed`);
for (const [name, all] of samples) {
  const late = all.slice(Math.floor(all.length / 3)); // the first third fills pools and caches
  const slope = slopeOf(late.map(([s, mib]) => [s / 3600, mib]));
  const [first, last] = [late[0], late.at(-1)];
  const most = MOST_GROWTH + (name === 'launcher' ? kept : 0);
  const fine = slope < most && last[2] <= first[2];
  good &&= fine;
  console.log(
    `${fine ? 'ok  ' : 'fail'}  ${name.padEnd(9)} ${first[1].toFixed(0)} -> ${last[1].toFixed(0)} MiB, slope ${slope.toFixed(1)} MiB/h, descriptors ${first[2]} -> ${last[2]}`,
  );
}
process.exit(good ? 0 : 1);

/** Of the straight line through [x, y] that fits best. */
function slopeOf(points) {
  const mean = (i) => points.reduce((sum, p) => sum + p[i], 0) / points.length;
  const [x, y] = [mean(0), mean(1)];
  const above = points.reduce((sum, p) => sum + (p[0] - x) * (p[1] - y), 0);
  return above / points.reduce((sum, p) => sum + (p[0] - x) ** 2, 0);
}
