// The golden checkpoints in float32: what Hugging Face transformers computed, at every number of GPUs and with every
// collective; and the same bits from all of them.

import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { good, must, root } from './harness.mjs';
import { maxDelta } from './parity.mjs';
import { readSafetensors } from './safetensors.mjs';

const BOUND = 1e-3;

/** Ranks and collective: every degree that the checkpoint allows, two of them by every collective. */
function waysOf({ degrees, collectives }, most) {
  const by = (ranks) => (ranks === 1 ? ['auto'] : ranks === 2 ? [...collectives, 'zmq'] : collectives);
  return degrees
    .filter((ranks) => ranks <= most)
    .flatMap((ranks) => by(ranks).map((collective) => [ranks, collective]));
}

export async function goldens(suite, gpus) {
  for (const [name, most] of [
    ['tiny-moe', 4],
    ['tiny-moe-hub', 8],
  ]) {
    const ways = waysOf(gpus, most);
    const dir = join(root, 'test/fixtures', name);
    const { prompts, greedy } = JSON.parse(readFileSync(join(dir, 'golden.json'), 'utf8'));
    const theirs = readSafetensors(join(dir, 'golden.safetensors'));
    const seen = new Map();
    for (const [ranks, collective] of ways) {
      const words = [
        ...['--gpus', gpus.flag(ranks), '--device', 'cuda', '--collective', collective, '--model', dir],
        ...['--dtype', 'float32', ...prompts.flatMap((ids) => ['--prompt-ids', ids.join(',')])],
      ];
      const way = `goldens: ${name} float32 by ${ranks} rank${ranks === 1 ? '' : `s, ${collective}`}`;

      await suite.test(`${way}: logits of transformers within ${BOUND}`, async () => {
        const folder = mkdtempSync(join(tmpdir(), 'tp-run-gpu-'));
        try {
          const dump = join(folder, 'logits.safetensors');
          await good(['score', ...words, '--dump-logits', dump, '--json']);
          const ours = readSafetensors(dump);
          const worst = [];
          for (const i of prompts.keys()) {
            const [a, b] = [ours(`prompt.${i}.logits`), theirs(`fp32.${i}.logits`)];
            must(a.length === b.length, `prompt ${i}: ${a.length} logits, not ${b.length}`);
            worst.push(maxDelta(a, b));
          }
          const largest = Math.max(...worst);
          must(largest < BOUND, `largest error ${largest}`);
          const hash = createHash('sha256').update(readFileSync(dump)).digest('hex');
          seen.set(way, hash);
          return `largest error ${largest.toExponential(2)}`;
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
      `goldens: ${name} float32: the same logits, bit for bit, all ${ways.length} times`,
      async () => {
        must(seen.size === ways.length, `only ${seen.size} ways gave logits`);
        must(new Set(seen.values()).size === 1, [...seen].map(([way, hash]) => `${way}: ${hash}`).join('\n'));
      },
    );
  }
}
