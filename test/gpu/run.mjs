// `npm run test:gpu [-- --only TEXT,TEXT]`, or `bin/node test/gpu/run.mjs` inside the bundle: everything that only a host
// with two GPUs and NCCL can show. Nothing is skipped: what cannot run here fails.

import { checkpoint, checks } from './checks.mjs';
import { faults } from './faults.mjs';
import { goldens } from './goldens.mjs';
import { must, run, Suite } from './harness.mjs';

const at = process.argv.indexOf('--only');
const suite = new Suite(at < 0 ? null : process.argv[at + 1]);

await suite.test('doctor finds two GPUs, NCCL, and no wrong sum', async () => {
  const { code, stdout, stderr } = await run(['doctor', '--gpus', '2', '--json'], { limitS: 180 });
  must(code === 0, `doctor ended with ${code}\n${stderr}`);
  const { gpus, findings } = JSON.parse(stdout);
  must(gpus, findings.map(({ what, text }) => `${what}: ${text}`).join('\n'));
  must(gpus.devices.length >= 2, `${gpus.devices.length} GPU`);
  must(gpus.nccl, 'no NCCL');
  must(gpus.not_measured.length === 0, JSON.stringify(gpus.not_measured));
  must(
    gpus.all_reduce.every(({ wrong }) => wrong === 0),
    JSON.stringify(gpus.all_reduce),
  );
  const names = gpus.devices.map(({ name }) => name).join(', ');
  return `${names}, driver ${gpus.driver}, CUDA ${gpus.cuda}, NCCL ${gpus.nccl}`;
});
for (const part of [goldens, checks, checkpoint, faults]) await part(suite);
process.exitCode = suite.end();
