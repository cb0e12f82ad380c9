// `npm run bench`, or `bin/node test/bench/run.mjs` inside the bundle: every figure that the README's tables need, from
// one build on one host, as one JSON file and one Markdown page, written anew after every part. What fails is named in
// both, and in the exit code.
//   --gpus 2          ranks at most, or the device of each: 8 measures TP=1, 2, 4 and 8; 0,0,1,1 four ranks on two cards
//   --only TEXT,TEXT  runs the parts whose name holds one: decode, stages, context, moe, allreduce, check, kill,
//                     checkpoint; `decode tp=2` is one of them. The doctor always comes first
//   --model FILE  (configs/gemma-4-26b-a4b.json)   --out DIR  (test/bench/results)   --device cuda|cpu  (cuda)
//   --batch-sizes 1,2,4,8,16,32   --contexts 128,1024,8192,32768   --steps 200   --part-limit 540  seconds of one part
//   --checkpoint DIR  also times loading that checkpoint

import { mkdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { provenance } from '../../dist/report/provenance.js';
import { passingCheck } from '../gpu/checks.mjs';
import { killInMidDecode } from '../gpu/faults.mjs';
import { Gpus } from '../gpu/gpus.mjs';
import { good, must, root } from '../gpu/harness.mjs';
import { markdown } from './markdown.mjs';

const text = (fallback) => ({ type: 'string', default: fallback });
const { values } = parseArgs({
  options: {
    gpus: text('2'),
    only: { type: 'string' },
    model: text(join(root, 'configs/gemma-4-26b-a4b.json')),
    out: text(join(root, 'test/bench/results')),
    device: text('cuda'),
    'batch-sizes': text('1,2,4,8,16,32'),
    contexts: text('128,1024,8192,32768'),
    steps: text('200'),
    'part-limit': text('540'),
    checkpoint: { type: 'string' },
  },
});
const gpus = new Gpus(values.gpus);
const limitS = Number(values['part-limit']);
const cuda = values.device === 'cuda';
const batches = values['batch-sizes'].split(',');
const some = [batches[0], ...(batches.includes('8') ? ['8'] : [])].join(); // where a table has another axis
const result = {
  schema: 'tp-run/bench/2',
  started: new Date().toISOString(),
  command: process.argv.slice(2),
  provenance: provenance(),
  gpus: null,
  decode: [],
  stages: [],
  context: [],
  moe: [],
  allreduce: [],
  load: [],
  checks: [],
  kill: [],
  failed: [],
  left_out: [],
};

const on = (ranks) => [
  '--gpus',
  gpus.flag(ranks),
  '--model',
  resolve(values.model),
  '--device',
  values.device,
];
const tpRun = (...words) => good([...words, '--json'], { limitS });
const benchDecode = (ranks, ...words) =>
  tpRun('bench', 'decode', ...on(ranks), '--steps', values.steps, '--warmup', '20', ...words);
const seconds = ({ load_s, stage_ms, weight_bytes }) => ({ load_s, stage_ms, weight_bytes });

const parts = [
  [
    'doctor',
    async () => {
      const { gpus: found } = await tpRun('doctor', '--gpus', `${gpus.cards}`, '--device', values.device);
      must(found !== null || !cuda, 'no usable GPU');
      result.gpus = found;
    },
  ],
  ...gpus.degrees.toReversed().flatMap((tp) => [
    [
      `decode tp=${tp}`,
      async () => {
        const bench = await benchDecode(tp, '--batch-size', values['batch-sizes']);
        result.decode.push(bench);
        result.load.push({ tp, what: 'synthetic', ...seconds(bench.run) });
      },
    ],
    [
      `stages tp=${tp}`,
      async () => {
        const trace = join(values.out, `${fileName()}-tp${tp}.trace.json`);
        const all = values['batch-sizes'];
        result.stages.push(await benchDecode(tp, '--batch-size', all, '--stages', '--trace', trace));
      },
    ],
    [
      `context tp=${tp}`,
      async () =>
        result.context.push(await benchDecode(tp, '--batch-size', some, '--context', values.contexts)),
    ],
  ]),
  ...(cuda ? gpus.degrees : []).map((tp) => [
    `moe tp=${tp}`,
    async () =>
      result.moe.push(await tpRun('bench', 'moe', '--gpus', `${tp}`, '--model', resolve(values.model))),
  ]),
  ...(gpus.count === 1 ? [] : cuda ? [...gpus.collectives, 'zmq'] : ['zmq']).map((collective) => [
    `allreduce ${collective}`,
    async () => {
      const words = ['--gpus', gpus.flag(gpus.count), '--device', values.device, '--collective', collective];
      result.allreduce.push(await tpRun('bench', 'allreduce', ...words));
    },
  ]),
  ...gpus.degrees.slice(1).map((tp) => [
    `check tp=${tp}`,
    async () => {
      const { verdict, line, run } = await passingCheck([...on(tp), '--max-tokens', '16']);
      result.checks.push({ tp, verdict, line, collective: run.collective });
    },
  ]),
  ...(gpus.count === 1 ? [] : [gpus.count]).map((ranks) => [
    `kill -9 of one of ${ranks}`,
    async () => {
      const where = ['--gpus', gpus.flag(ranks), '--device', values.device];
      const victim = ranks - 1;
      const took = await killInMidDecode(where, resolve(values.model), ranks, victim);
      result.kill.push({ ranks, victim, seconds: took });
    },
  ]),
  ...(values.checkpoint ? gpus.degrees : []).map((tp) => [
    `checkpoint tp=${tp}`,
    async () => {
      const where = [
        '--gpus',
        gpus.flag(tp),
        '--model',
        resolve(values.checkpoint),
        '--device',
        values.device,
      ];
      await tpRun(...where, '--prompt-ids', '2', '--max-tokens', '1'); // into the page cache
      const { run } = await tpRun(...where, '--prompt-ids', '2', '--max-tokens', '1');
      result.load.push({ tp, what: 'checkpoint', ...seconds(run) });
    },
  ]),
];

mkdirSync(values.out, { recursive: true });
for (const [name, work] of parts) await part(name, work);
process.stdout.write(markdown(result, `${fileName()}.json`));
process.exitCode = result.failed.length > 0 ? 1 : 0;

/** Does one part and writes down how it went; a failure does not keep the others from going on. */
async function part(name, work) {
  const always = name === 'doctor'; // results must say what they were measured on
  if (!always && values.only !== undefined && !values.only.split(',').some((piece) => name.includes(piece))) {
    result.left_out.push(name);
    return;
  }
  const start = performance.now();
  try {
    await work();
    process.stderr.write(`bench: ${name} (${((performance.now() - start) / 1000).toFixed(1)} s)\n`);
  } catch (error) {
    process.stderr.write(`bench: ${name} FAILED: ${error.message}\n`);
    result.failed.push({ name, error: error.message });
  }
  writeFileSync(join(values.out, `${fileName()}.json`), `${JSON.stringify(result)}\n`);
  writeFileSync(join(values.out, `${fileName()}.md`), markdown(result, `${fileName()}.json`));
}

/** Names card, ranks, day and commit. */
function fileName() {
  const card = result.gpus?.devices[0]?.name.toLowerCase().replace(/[^a-z0-9]+/g, '-') ?? values.device;
  const { commit } = result.provenance;
  return `bench-${card}-x${gpus.cards}-tp${gpus.count}-${result.started.slice(0, 16).replace(':', '')}-${commit ?? 'unknown'}`;
}
