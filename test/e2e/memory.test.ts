import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { GenerateResult } from '../../src/report/schema.js';
import { root } from '../helpers/fixture.js';
import { Running, residentMiB, sleep } from '../helpers/running.js';
import { tempDir } from '../helpers/tempdir.js';
import { tpRun } from '../helpers/tp-run.js';

const runs: Running[] = [];
afterEach(async () => {
  for (const run of runs) run.signal('SIGKILL');
  for (const run of runs.splice(0)) await run.ended;
});

/** One layer of the 26B width with a quarter of its experts and of its vocabulary: 1.2 GB. */
function oneLayer(): string {
  const file = JSON.parse(readFileSync(join(root, 'configs/gemma-4-26b-a4b-3layers.json'), 'utf8'));
  Object.assign(file.config, { num_hidden_layers: 1, layer_types: ['full_attention'] });
  Object.assign(file.config, { num_experts: 32, vocab_size: 65_536, max_position_embeddings: 4096 });
  const path = join(tempDir(), 'one-layer.json');
  writeFileSync(path, JSON.stringify(file));
  return path;
}

/** The most that any look at each rank found, and what each says its weights take, in MiB. */
async function memoryOf(model: string): Promise<{ most: number[]; weights: number[] }> {
  const words = ['--device', 'cpu', '--gpus', '2', '--threads', '1', '--prompt-ids', '2,17,5', '--json'];
  const run = new Running([...words, '--model', model, '--max-tokens', '20', '--ignore-eos']);
  runs.push(run);
  const most = [0, 0];
  while (!run.hasEnded) {
    for (const [rank, pid] of run.workers().entries()) most[rank] = Math.max(most[rank]!, residentMiB(pid));
    await sleep(5);
  }
  const { code, stdout, stderr } = await run.ended;
  expect(code, stderr).toBe(0);
  const { run: about } = GenerateResult.parse(JSON.parse(stdout));
  return { most, weights: about.weight_bytes.map((bytes) => bytes / 2 ** 20) };
}

describe('a rank', () => {
  it.each(['synthetic weights', 'a checkpoint'])('holds its shard of %s and little more', async (from) => {
    let path = oneLayer();
    if (from === 'a checkpoint') {
      const checkpoint = join(tempDir(), 'checkpoint');
      expect(await tpRun(['export', checkpoint, '--model', path])).toMatchObject({ code: 0 });
      path = checkpoint;
    }
    const { most, weights } = await memoryOf(path);
    for (const [rank, mib] of most.entries()) {
      expect(weights[rank]).toBeGreaterThan(300);
      expect(mib).toBeGreaterThan(weights[rank]!);
      expect(mib).toBeLessThan(weights[rank]! + 250); // a Node process takes some 60
    }
  });
});
