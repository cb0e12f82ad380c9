// What ThreadSanitizer looks at (`npm run test:tsan`): engines that compute at the same time, each with a pool of several threads
// and a thread of its own, while the main thread asks and closes. Plain node: a test runner brings threads of its own.

import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { FlightRecorder } from '../../dist/comm/flight-recorder.js';
import { localCollective } from '../../dist/comm/local.js';
import { decode } from '../../dist/engine/decode.js';
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

/** Opens an engine, decodes the job, closes it; everything that it said, as text. */
async function life(threads, isa) {
  const plan = makePlan(config, 0, 1);
  const spec = {
    ...plan,
    device: 'cpu',
    deviceIndex: 0,
    dtype: 'bfloat16',
    collective: 'local',
    isa,
    threads,
    limits,
  };
  const engine = new (native().Engine)({ ...spec, trace: true });
  await loadWeights(engine, plan, { kind: 'synthetic', seed, config });
  await engine.prepare();
  const said = [];
  const decoder = {
    rank: 0,
    size: 1,
    engine,
    collective: localCollective,
    recorder: new FlightRecorder(),
    steps: plan.steps,
    limits,
  };
  await decode({ ...decoder, trace: true, bursts: false }, job, (report) => {
    const hashes = report.trace.map((entry) => [...entry.hashes].join(' '));
    said.push(report.rows.map(({ token, logprob }) => `${token}:${logprob}`).join(' '), ...hashes);
  });
  await engine.readBandwidth(0.01);
  engine.close();
  return said.join('\n');
}

const base = await life(1, 'generic');
const isas = native().version().isa;
for (let round = 0; round < 3; round++) {
  const lives = await Promise.all(Array.from({ length: 4 }, (_, i) => life(2 + i, isas[i % isas.length])));
  if (lives.some((said) => said !== base)) {
    console.error(`round ${round}: threads or instruction sets changed a bit`);
    process.exit(1);
  }
}
// an engine that is dropped with a call under way
const plan = makePlan(config, 0, 1);
const spec = {
  ...plan,
  device: 'cpu',
  deviceIndex: 0,
  dtype: 'bfloat16',
  collective: 'local',
  isa: 'auto',
  threads: 3,
  limits,
};
const engine = new (native().Engine)({ ...spec, trace: false });
const pending = loadWeights(engine, plan, { kind: 'synthetic', seed, config }).catch(() => {});
engine.close();
await pending;
console.log(`threads: 12 engines of 2 to 5 threads gave the bits of one thread (${isas.join(', ')})`);
