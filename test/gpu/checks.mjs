// `tp-run check` on two GPUs: the bits of one, with each device collective, at the tiny size and at the real width.

import { good, must, REAL_WIDTH } from './harness.mjs';

export async function checks(suite) {
  for (const collective of ['peer', 'nccl']) {
    for (const [name, model] of [
      ['tiny', []],
      ['real width', ['--model', REAL_WIDTH, '--max-tokens', '8']],
    ]) {
      await suite.test(`check --gpus 2 --collective ${collective}, ${name}`, async () => {
        const words = ['check', '--gpus', '2', '--device', 'cuda', '--collective', collective, ...model];
        const { verdict, line, run } = await good([...words, '--json'], { limitS: 600 });
        must(verdict === 'pass', line);
        must(run.collective === collective, `it ran on ${run.collective_why}`);
        return line;
      });
    }
  }
}
