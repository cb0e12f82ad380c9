// `node scripts/soak.mjs [--minutes 30] [--out FILE.json] [more words for tp-run, such as --gpus 4 --device cpu]`: one run that
// decodes without end, short sequences that come and go. Watches memory and descriptors of this process, which is the
// launcher, and of every rank, and the time of steps. A line per verdict; ends with 1 when one of them is bad. Needs dist/.

import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { availableParallelism, loadavg } from 'node:os';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { chooseDevice } from '../dist/cli/device.js';
import { openModel } from '../dist/cli/model.js';
import { workerEnvironment } from '../dist/cli/nodes.js';
import { ranksOf, readCommandLine } from '../dist/cli/options.js';
import { runSpec } from '../dist/cli/spec.js';
import { launch } from '../dist/engine/launcher.js';
import { provenance } from '../dist/report/provenance.js';

/** A process that grows faster leaks, in MiB an hour. */
const MOST_GROWTH = 32;
/** An allocator breathes: so much growth in all says nothing, in MiB. */
const BREATH = 4;
/** Of the time of a step: a run that stalls now and then has a longer tail than noise gives. */
const MOST_P99_OF_MEDIAN = 3;
/** A shorter run shows how V8's heap grows into its size, and no leak: its memory is told and not judged. */
const LONG_ENOUGH = 10;
/** V8 lets garbage lie while there is room, which looks like a leak: ranks get little. What then leaks ends the run. */
const SMALL_HEAP = '--max-semi-space-size=1 --max-old-space-size=48';
/** The first part of the time fills pools and caches. */
const WARM_UP = 1 / 3;
const EVERY_MS = 2000;
const STRETCHES = 8;
/** Sequences of one job, new tokens of each, sequences at a time: one begins whenever another ends. */
const [SEQUENCES, TOKENS, AT_ONCE] = [64, 48, 4];

const words = process.argv.slice(2);
const take = (name, fallback) => {
  const at = words.indexOf(name);
  return at < 0 ? fallback : words.splice(at, 2)[1];
};
const minutes = Number(take('--minutes', '30'));
const out = take('--out', null);
if (!words.includes('--gpus')) words.push('--gpus', '4');
setFlagsFromString('--expose-gc');
const collectGarbage = runInNewContext('gc');

const { options } = readCommandLine(['generate', ...words]);
const model = openModel(options.model, options.seed);
const spec = runSpec(options, model, chooseDevice(options), {
  ranks: ranksOf(options),
  sequences: AT_ONCE,
  positions: TOKENS + 4,
  everyRow: false,
  candidates: 1,
  trace: false,
});
const vocab = model.config.vocabSize;
const env = workerEnvironment(options);
const run = await launch(spec, {
  env: { ...env, NODE_OPTIONS: `${env.NODE_OPTIONS ?? process.env.NODE_OPTIONS ?? ''} ${SMALL_HEAP}`.trim() },
});

const started = performance.now();
const elapsed = () => (performance.now() - started) / 60_000 / minutes;
/** By process: [hours, MiB, descriptors]. */
const samples = new Map();
/** Milliseconds of steps, in buckets of one per cent: constant memory. */
const taken = new Map();
let jobs = 0;
let steps = 0;
const sampling = setInterval(sample, EVERY_MS);
let failure = null;
try {
  while (elapsed() < 1) await decodeOnce();
} catch (error) {
  failure = error;
} finally {
  clearInterval(sampling);
  await run.close();
}
report();

/** One job; how long each of its decode steps took rank 0, the host's part included: on GPUs steps come in bursts, each of them
 * timed on the device. */
async function decodeOnce() {
  const sequences = Array.from({ length: SEQUENCES }, (_, sequence) => ({
    promptIds: [2, (jobs * SEQUENCES + sequence) % vocab],
    maxTokens: TOKENS,
    sequence,
  }));
  const sampling = { temperature: 0, topK: 0, topP: 1, seed: 0 };
  const job = { kind: 'generate', sequences, sampling, stopTokenIds: [], keepLogits: false, fault: null };
  await run.execute(job, ({ kind, ranks: [{ time }] }) => {
    steps++;
    if (kind !== 'decode' || elapsed() <= WARM_UP) return;
    const { computeMs, syncMs, hostMs } = time;
    const bucket = Math.round(Math.log(computeMs + syncMs + hostMs) / Math.log(1.01));
    taken.set(bucket, (taken.get(bucket) ?? 0) + 1);
  });
  jobs++;
}

function sample() {
  collectGarbage();
  const processes = [['launcher', process.pid], ...run.ranks.map(({ rank, pid }) => [`rank ${rank}`, pid])];
  for (const [name, pid] of processes) {
    try {
      const mib = Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))[1]) / 1024;
      const descriptors = readdirSync(`/proc/${pid}/fd`).length;
      const all = samples.get(name) ?? [];
      all.push([(performance.now() - started) / 3_600_000, mib, descriptors]);
      samples.set(name, all);
    } catch {
      // it has ended: the run says so
    }
  }
}

function report() {
  const processes = [...samples].map(([name, all]) => judge(name, all));
  const ms = times();
  const lines = processes.map(({ name, fine, mib, growth, descriptors }) => [
    fine,
    `${name.padEnd(9)} ${mib[0].toFixed(0)} -> ${mib[1].toFixed(0)} MiB, slope ${growth.toFixed(1)} MiB/h (at most ${MOST_GROWTH}), descriptors ${descriptors.join(' -> ')}`,
  ]);
  const steady = ms.p99 <= MOST_P99_OF_MEDIAN * ms.median;
  lines.push([
    steady,
    `steps     median ${ms.median.toFixed(2)} ms, p99 ${ms.p99.toFixed(2)} ms (at most ${MOST_P99_OF_MEDIAN} times the median), longest ${ms.longest.toFixed(1)} ms, of ${ms.count}`,
  ]);
  lines.push([
    failure === null,
    `run       ${failure ? failure.message : `${jobs} jobs, ${steps} steps without a failure`}`,
  ]);
  const good = lines.every(([fine]) => fine);
  const load = loadavg()[0];
  console.log(
    `soak: ${minutes} minutes, ${spec.ranks} ranks on ${spec.device}, collective ${run.collective.why}`,
  );
  if (load > availableParallelism() + spec.ranks)
    console.log(
      `note  other programs kept this machine busy (load ${load.toFixed(1)}): the times of steps are not this program's alone`,
    );
  if (minutes < LONG_ENOUGH)
    console.log(`note  ${minutes} minutes are too short to judge memory: ${LONG_ENOUGH} at least`);
  for (const [fine, text] of lines) console.log(`${fine ? 'ok  ' : 'fail'}  ${text}`);
  console.log(good ? 'PASS' : 'FAIL');
  const result = {
    schema: 'tp-run/soak/1',
    verdict: good ? 'pass' : 'fail',
    minutes,
    ranks: spec.ranks,
    device: spec.device,
    collective: run.collective.name,
    memory_judged: minutes >= LONG_ENOUGH,
    limits: { mib_per_hour: MOST_GROWTH, p99_of_median: MOST_P99_OF_MEDIAN },
    processes: processes.map(({ name, fine, mib, growth, descriptors }) => ({
      name,
      fine,
      mib,
      mib_per_hour: growth,
      descriptors,
    })),
    step_ms: ms,
    jobs,
    steps,
    failure: failure?.message ?? null,
    load,
    provenance: provenance(),
  };
  if (out !== null) writeFileSync(out, `${JSON.stringify(result, null, 1)}\n`);
  process.exitCode = good ? 0 : 1;
}

/** Growth is the slope of the straight line through what is left after each garbage collection, behind the warm-up. */
function judge(name, all) {
  const late = all.slice(Math.floor(all.length * WARM_UP));
  const [first, last] = [late[0], late.at(-1)];
  const growth = slopeOf(lowest(late));
  const inAll = growth * (last[0] - first[0]);
  const leaks = minutes >= LONG_ENOUGH && growth > MOST_GROWTH && inAll > BREATH;
  const fine = !leaks && last[2] <= first[2];
  return { name, fine, mib: [first[1], last[1]], growth, descriptors: [first[2], last[2]] };
}

/** The smallest of each of some stretches of time: memory goes up and down like a saw. */
function lowest(points) {
  const each = Math.max(1, Math.ceil(points.length / STRETCHES));
  const stretches = Array.from({ length: Math.ceil(points.length / each) }, (_, i) =>
    points.slice(i * each, (i + 1) * each),
  );
  return stretches.map((some) => some.reduce((a, b) => (b[1] < a[1] ? b : a)));
}

function slopeOf(points) {
  const mean = (i) => points.reduce((sum, p) => sum + p[i], 0) / points.length;
  const [x, y] = [mean(0), mean(1)];
  const above = points.reduce((sum, p) => sum + (p[0] - x) * (p[1] - y), 0);
  return above / points.reduce((sum, p) => sum + (p[0] - x) ** 2, 0);
}

/** Quantiles to one per cent. */
function times() {
  const sorted = [...taken].sort(([a], [b]) => a - b);
  const count = sorted.reduce((n, [, times]) => n + times, 0);
  const quantile = (q) => {
    let seen = 0;
    for (const [bucket, times] of sorted) {
      seen += times;
      if (seen >= q * count) return 1.01 ** bucket;
    }
    return Number.NaN;
  };
  return { count, median: quantile(0.5), p99: quantile(0.99), longest: quantile(1) };
}
