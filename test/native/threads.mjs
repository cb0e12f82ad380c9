// What ThreadSanitizer looks at (`npm run test:tsan`): engines that compute at the same time, each with a pool of several threads
// and a thread of its own, while the main thread asks and closes. Plain node: a test runner brings threads of its own.

import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { FlightRecorder } from '../../dist/comm/flight-recorder.js';
import { localCollective } from '../../dist/comm/local.js';
import { decode } from '../../dist/engine/decode.js';
import { openCheckpoint } from '../../dist/model/checkpoint.js';
import { readConfigFile } from '../../dist/model/configfile.js';
import { makePlan } from '../../dist/model/plan.js';
import { loadWeights } from '../../dist/model/weights.js';
import { native } from '../../dist/native.js';

const { config, seed } = readConfigFile(
  join(fileURLToPath(new URL('../..', import.meta.url)), 'configs/tiny.json'),
);
const limits = { tokens: 16, rows: 4, sequences: 4, positions: 64, candidates: 1 };
const job = {
  kind: 'generate',
  sequences: [[2, 17, 5], [9, 8, 7, 6], [3], [4, 4]].map((promptIds, sequence) => ({
    promptIds,
    maxTokens: 6,
    sequence,
  })),
  sampling: { temperature: 0.8, topK: 0, topP: 1, seed: 3 },
  stopTokenIds: [],
  keepLogits: true,
  fault: null,
};

const SYNTHETIC = { kind: 'synthetic', seed, config };

function open(threads, isa, more = {}) {
  const { plan = makePlan(config, 0, 1), ...changes } = more;
  const spec = {
    ...plan,
    device: 'cpu',
    deviceIndex: 0,
    dtype: 'bfloat16',
    collective: 'local',
    isa,
    threads,
    limits,
    trace: true,
    ...changes,
  };
  return { plan, engine: new (native().Engine)(spec) };
}

/** What a rank decodes, as text: tokens and their probabilities, and with `hashes` every stage. */
async function said({ plan, engine }, collective, hashes) {
  const lines = [];
  const decoder = {
    rank: plan.rank,
    size: plan.size,
    engine,
    collective,
    recorder: new FlightRecorder(),
    steps: plan.steps,
    limits,
    trace: true,
    bursts: false,
    onDevice: false,
  };
  await decode(decoder, job, (report) => {
    lines.push(report.rows.map(({ token, logprob }) => `${token}:${logprob}`).join(' '));
    if (hashes) lines.push(...report.trace.map((entry) => [...entry.hashes].join(' ')));
  });
  return lines.join('\n');
}

/** Opens an engine, decodes the job, closes it. */
async function life(threads, isa) {
  const { plan, engine } = open(threads, isa);
  await loadWeights(engine, plan, SYNTHETIC);
  await engine.prepare();
  const text = await said({ plan, engine }, localCollective(), true);
  await engine.readBandwidth(0.01);
  engine.close();
  return text;
}

/** Where two ranks of one process meet: the second to come does the sum or the gather for both. */
class Meeting {
  #first = null;

  collective(rank) {
    const meet = (send, gathered) =>
      new Promise((done) => {
        const mine = { send, gathered, done };
        if (this.#first === null) this.#first = mine;
        else this.#join(rank === 1 ? [this.#first, mine] : [mine, this.#first]);
      });
    return { name: 'zmq', allReduce: (buffer) => meet(buffer, null), gather: meet };
  }

  #join(ranks) {
    this.#first = null;
    const sent = ranks.map(({ send }) => Float32Array.from(send));
    for (const { send, gathered, done } of ranks) {
      if (gathered) for (const [r, part] of sent.entries()) gathered.set(part, r * part.length);
      else for (let i = 0; i < send.length; i++) send[i] = sent[0][i] + sent[1][i];
      done();
    }
  }
}

/** Two ranks that decode together, each with threads of its own. */
async function pair(threads, isa) {
  const meeting = new Meeting();
  const ranks = await Promise.all(
    [0, 1].map(async (rank) => {
      const opened = open(threads, isa, { plan: makePlan(config, rank, 2), collective: 'host' });
      await loadWeights(opened.engine, opened.plan, SYNTHETIC);
      await opened.engine.prepare();
      return opened;
    }),
  );
  const both = await Promise.all(ranks.map((rank) => said(rank, meeting.collective(rank.plan.rank), false)));
  for (const { engine } of ranks) engine.close();
  if (both[0] !== both[1]) throw new Error('two ranks decoded different tokens');
  return both[0];
}

/** Reads a checkpoint's files with several threads, again and again until `over`. */
async function reader(threads, over) {
  const root = fileURLToPath(new URL('../fixtures/tiny-moe', import.meta.url));
  let times = 0;
  do {
    const checkpoint = openCheckpoint(root);
    const plan = makePlan(checkpoint.config, times % 2, 2);
    const { engine } = open(threads, 'auto', { plan, collective: 'host', trace: false });
    await loadWeights(engine, plan, { kind: 'checkpoint', checkpoint });
    checkpoint.close();
    await engine.prepare();
    engine.close();
    times++;
  } while (!over());
  return times;
}

const fail = (what) => {
  console.error(what);
  process.exit(1);
};

const base = await life(1, 'generic');
const isas = native().version().isa;
for (let round = 0; round < 3; round++) {
  const lives = await Promise.all(Array.from({ length: 4 }, (_, i) => life(2 + i, isas[i % isas.length])));
  if (lives.some((text) => text !== base)) fail(`round ${round}: threads or instruction sets changed a bit`);
}

// two ranks decode while two more engines read their weights
const alone = open(1, 'generic');
await loadWeights(alone.engine, alone.plan, SYNTHETIC);
await alone.engine.prepare();
const expected = await said(alone, localCollective(), false);
alone.engine.close();
let over = false;
const readers = [reader(2, () => over), reader(3, () => over)];
for (const isa of isas)
  if ((await pair(2, isa)) !== expected) fail(`two ranks (${isa}) decoded other tokens than one`);
over = true;
const reads = await Promise.all(readers);

// an engine that is dropped with a call under way
const dropped = open(3, 'auto');
const pending = loadWeights(dropped.engine, dropped.plan, SYNTHETIC).catch(() => {});
dropped.engine.close();
await pending;
console.log(
  `threads: 12 engines of 2 to 5 threads gave the bits of one thread (${isas.join(', ')}), and so did two ranks while ` +
    `${reads.join(' + ')} checkpoints were read beside them`,
);
