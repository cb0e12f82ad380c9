// The golden checkpoints in float32: what Hugging Face transformers computed, at every number of GPUs and with every
// collective; and the same bits from all of them.

import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { good, must, root } from './harness.mjs';

const BOUND = 1e-3;
const WAYS = [
  ['1', 'auto'],
  ['2', 'peer'],
  ['2', 'nccl'],
  ['2', 'zmq'],
];

export async function goldens(suite) {
  for (const name of ['tiny-moe', 'tiny-moe-hub']) {
    const dir = join(root, 'test/fixtures', name);
    const { prompts, greedy } = JSON.parse(readFileSync(join(dir, 'golden.json'), 'utf8'));
    const theirs = readSafetensors(join(dir, 'golden.safetensors'));
    const seen = new Map();
    for (const [gpus, collective] of WAYS) {
      const words = [
        ...['--gpus', gpus, '--device', 'cuda', '--collective', collective, '--model', dir],
        ...['--dtype', 'float32', ...prompts.flatMap((ids) => ['--prompt-ids', ids.join(',')])],
      ];
      const way = `${name} float32 on ${gpus} GPU${gpus === '1' ? '' : `s, ${collective}`}`;

      await suite.test(`${way}: logits of transformers within ${BOUND}`, async () => {
        const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
        try {
          const dump = join(folder, 'logits.safetensors');
          await good(['score', ...words, '--dump-logits', dump, '--json']);
          const ours = readSafetensors(dump);
          let worst = 0;
          for (const i of prompts.keys()) {
            const [a, b] = [ours(`prompt.${i}.logits`), theirs(`fp32.${i}.logits`)];
            must(a.length === b.length, `prompt ${i}: ${a.length} logits, not ${b.length}`);
            for (const [k, value] of a.entries()) {
              const error = Math.abs(value - b[k]);
              if (!(error <= worst)) worst = error; // NaN counts
            }
          }
          must(worst < BOUND, `largest error ${worst}`);
          const hash = createHash('sha256').update(readFileSync(dump)).digest('hex');
          seen.set(way, hash);
          return `largest error ${worst.toExponential(2)}`;
        } finally {
          rmSync(folder, { recursive: true });
        }
      });

      await suite.test(`${way}: greedy tokens of transformers`, async () => {
        const steps = String(greedy[0].tokens.length);
        const { results } = await good([
          'generate',
          ...words,
          '--max-tokens',
          steps,
          '--ignore-eos',
          '--json',
        ]);
        for (const [i, { token_ids }] of results.entries())
          must(
            token_ids.join() === greedy[i].tokens.join(),
            `prompt ${i}: ${token_ids.join()}, not ${greedy[i].tokens.join()}`,
          );
      });
    }
    await suite.test(
      `${name} float32: the same logits, bit for bit, in all ${WAYS.length} ways`,
      async () => {
        must(seen.size === WAYS.length, `only ${seen.size} ways gave logits`);
        must(new Set(seen.values()).size === 1, [...seen].map(([way, hash]) => `${way}: ${hash}`).join('\n'));
      },
    );
  }
}

/** Reads fp32 tensors by name from a safetensors file that we trust. */
function readSafetensors(path) {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + length));
  return (name) => {
    const tensor = header[name];
    must(tensor?.dtype === 'F32', `${path} has no F32 tensor ${name}`);
    const [from, to] = tensor.data_offsets;
    const copy = new Uint8Array(to - from);
    copy.set(bytes.subarray(8 + length + from, 8 + length + to));
    return new Float32Array(copy.buffer);
  };
}
