// `npm run test:gpu`, or `bin/node test/gpu/run.mjs` inside the bundle: everything that only a host with GPUs and NCCL can
// show. Nothing is skipped in silence: what cannot run here fails.
//   --gpus 2        ranks at most, or the device of each: 8, or 0,0,1,1 for four ranks on two cards
//   --only TEXT,TEXT  runs the pieces whose name holds one: doctor, goldens, check, check 26B, ways 26B, checkpoint,
//                   transformers, faults
//   --out FILE      also writes the results there as JSON, after every piece

import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { provenance } from '../../dist/report/provenance.js';
import { checkpoint, checks } from './checks.mjs';
import { faults } from './faults.mjs';
import { goldens } from './goldens.mjs';
import { Gpus } from './gpus.mjs';
import { must, run, Suite } from './harness.mjs';
import { transformers } from './transformers.mjs';

const { values } = parseArgs({
  options: { gpus: { type: 'string', default: '2' }, only: { type: 'string' }, out: { type: 'string' } },
});
const gpus = new Gpus(values.gpus);
const report = {
  schema: 'tp-run/gpu-tests/1',
  command: process.argv.slice(2),
  provenance: provenance(),
  gpus: null,
  results: [],
};
const suite = new Suite(values.only ?? null, () => {
  report.results = suite.results;
  if (values.out) writeFileSync(values.out, `${JSON.stringify(report, null, 1)}\n`);
});

await suite.test(`doctor: ${gpus.cards} GPUs, NCCL, and no wrong sum`, async () => {
  const { code, stdout, stderr } = await run(['doctor', '--gpus', `${gpus.cards}`, '--json'], {
    limitS: 180,
  });
  must(code === 0, `doctor ended with ${code}\n${stderr}`);
  const { gpus: found, findings } = JSON.parse(stdout);
  must(found, findings.map(({ what, text }) => `${what}: ${text}`).join('\n'));
  report.gpus = found;
  must(found.devices.length >= gpus.cards, `${found.devices.length} GPU`);
  must(found.nccl, 'no NCCL');
  must(found.not_measured.length === 0, JSON.stringify(found.not_measured));
  must(
    found.all_reduce.every(({ wrong }) => wrong === 0),
    JSON.stringify(found.all_reduce),
  );
  const names = found.devices.map(({ name }) => name).join(', ');
  return `${names}, driver ${found.driver}, CUDA ${found.cuda}, NCCL ${found.nccl}`;
});
for (const part of [goldens, checks, checkpoint, transformers, faults]) await part(suite, gpus);
process.exitCode = suite.end();
