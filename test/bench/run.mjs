// `npm run bench`, or `bin/node test/bench/run.mjs` inside the bundle: every figure that the README's tables need, from
// one build on one host, as one JSON file and one Markdown page. What fails is named in both, and in the exit code.
//   --model FILE  (configs/gemma-4-26b-a4b.json)     --out DIR  (test/bench/results)
//   --device cuda|cpu  (cuda)   --tp 1,2   --batch-sizes 1,2,4,8,16,32   --contexts 128,1024,8192,32768   --steps 200
//   --collectives peer,nccl,zmq   --checkpoint DIR  also times loading that checkpoint

import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { must, root, run } from '../gpu/harness.mjs';
import { markdown } from './markdown.mjs';

const text = (fallback) => ({ type: 'string', default: fallback });
const { values } = parseArgs({
  options: {
    model: text(join(root, 'configs/gemma-4-26b-a4b.json')),
    out: text(join(root, 'test/bench/results')),
    device: text('cuda'),
    tp: text('1,2'),
    'batch-sizes': text('1,2,4,8,16,32'),
    contexts: text('128,1024,8192,32768'),
    steps: text('200'),
    collectives: text('peer,nccl,zmq'),
    checkpoint: { type: 'string' },
  },
});
const list = (name) => values[name].split(',');
const degrees = list('tp');
const most = String(Math.max(...degrees.map(Number)));
const [short] = list('contexts');
const COMMON = ['--device', values.device];
const LIMIT_S = 1800;

const result = {
  schema: 'tp-run/bench/1',
  started: new Date().toISOString(),
  command: process.argv.slice(2),
  provenance: null,
  gpus: null,
  decode: [],
  allreduce: [],
  load: [],
  failed: [],
};

/** Does one measurement; a failure is written down and the others go on. */
async function part(name, work) {
  process.stderr.write(`bench: ${name}\n`);
  try {
    await work();
  } catch (error) {
    process.stderr.write(`bench: ${name}: ${error.message}\n`);
    result.failed.push({ name, error: error.message });
  }
}

/** Runs a command of tp-run to its good end; the JSON that it prints. */
async function tpRun(...words) {
  const { code, signal, late, stdout, stderr } = await run([...words, '--json'], { limitS: LIMIT_S });
  must(!late, `tp-run ${words.join(' ')}: not over after ${late} s`);
  must(code === 0, `tp-run ${words.join(' ')} ended with ${code ?? signal}:\n${stderr}`);
  return JSON.parse(stdout);
}

const onDegree = (tp) => ['--gpus', tp, '--model', resolve(values.model), ...COMMON];
const seconds = (load) => ({ load_s: load.load_s, stage_ms: load.stage_ms, weight_bytes: load.weight_bytes });

await part('doctor', async () => {
  const { gpus } = await tpRun('doctor', '--gpus', most, ...COMMON);
  must(gpus !== null || values.device === 'cpu', 'no usable GPU');
  result.gpus = gpus;
});
for (const tp of degrees) {
  await part(`decode, tp=${tp}, all batch sizes`, async () => {
    const shape = ['--batch-size', values['batch-sizes'], '--context', short, '--steps', values.steps];
    const bench = await tpRun('bench', 'decode', ...onDegree(tp), ...shape, '--warmup', '20');
    result.decode.push(bench);
    result.provenance = bench.provenance;
    result.load.push({ tp: Number(tp), what: 'synthetic', ...seconds(bench.run) });
  });
  for (const context of list('contexts').slice(1)) {
    await part(`decode, tp=${tp}, context ${context}`, async () => {
      const shape = ['--context', context, '--steps', values.steps, '--warmup', '20'];
      result.decode.push(await tpRun('bench', 'decode', ...onDegree(tp), ...shape));
    });
  }
  if (values.checkpoint) {
    await part(`load ${values.checkpoint}, tp=${tp}`, async () => {
      const where = ['--gpus', tp, '--model', resolve(values.checkpoint), ...COMMON];
      await tpRun(...where, '--prompt-ids', '2', '--max-tokens', '1'); // into the page cache
      const { run } = await tpRun(...where, '--prompt-ids', '2', '--max-tokens', '1');
      result.load.push({ tp: Number(tp), what: 'checkpoint', ...seconds(run) });
    });
  }
}
for (const collective of Number(most) > 1 ? list('collectives') : []) {
  await part(`all-reduce by ${collective}`, async () => {
    const words = ['--gpus', most, '--collective', collective, ...COMMON];
    result.allreduce.push(await tpRun('bench', 'allreduce', ...words));
  });
}

mkdirSync(values.out, { recursive: true });
const device = result.gpus?.devices[0]?.name.toLowerCase().replace(/[^a-z0-9]+/g, '-') ?? values.device;
const name = `bench-${device}-${result.started.slice(0, 10)}-${result.provenance?.commit ?? 'unknown'}`;
writeFileSync(join(values.out, `${name}.json`), `${JSON.stringify(result)}\n`);
writeFileSync(join(values.out, `${name}.md`), markdown(result, `${name}.json`));
process.stdout.write(readFileSync(join(values.out, `${name}.md`), 'utf8'));
process.exitCode = result.failed.length > 0 ? 1 : 0;
