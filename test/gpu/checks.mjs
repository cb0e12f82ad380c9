// `tp-run check` on two GPUs: the bits of one, with each device collective, at the tiny size and at the real width.

import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
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

/** Weights read from a checkpoint are those that the seed makes: both give the same logits, bit for bit. */
export async function checkpoint(suite) {
  const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
  const dir = join(folder, 'model');
  const logitsOf = async (gpus, model) => {
    const dump = join(folder, 'logits.safetensors');
    const words = [
      'score',
      '--gpus',
      gpus,
      '--device',
      'cuda',
      '--model',
      model,
      '--prompt-ids',
      '2,17,5,99,1234',
    ];
    const { run } = await good([...words, '--dump-logits', dump, '--json']);
    return { run, hash: createHash('sha256').update(readFileSync(dump)).digest('hex') };
  };
  try {
    await suite.test('export of the real width', async () => {
      await good(['export', dir, '--model', REAL_WIDTH], { limitS: 600 });
    });
    for (const gpus of ['1', '2']) {
      await suite.test(
        `weights from a checkpoint, --gpus ${gpus}: the bits of the synthetic ones`,
        async () => {
          const made = await logitsOf(gpus, REAL_WIDTH);
          await logitsOf(gpus, dir); // into the page cache
          const { run, hash } = await logitsOf(gpus, dir);
          must(hash === made.hash, `other logits: ${hash}, not ${made.hash}`);
          const rates = run.weight_bytes.map((bytes) => (bytes / 1e6 / run.stage_ms.weights).toFixed(1));
          return `read at ${rates.join(' and ')} GB/s`;
        },
      );
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
}
