import { cpSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { type Checkpoint, openCheckpoint } from '../../src/model/checkpoint.js';
import { DEFAULT_CONFIG_FILE, readConfigFile } from '../../src/model/configfile.js';
import { exportCheckpoint } from '../../src/model/export.js';
import { makePlan } from '../../src/model/plan.js';
import { loadWeights, type WeightSource, weightBytes } from '../../src/model/weights.js';
import { type NativeEngine, native } from '../../src/native.js';
import { fixture } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';

const closing: { close(): void }[] = [];
afterEach(() => {
  for (const thing of closing.splice(0)) thing.close();
});

function open(dir: string): Checkpoint {
  const checkpoint = openCheckpoint(dir);
  closing.push(checkpoint);
  return checkpoint;
}

function engineOf(plan: ReturnType<typeof makePlan>): NativeEngine {
  const engine = new (native().Engine)({
    ...plan,
    device: 'cpu',
    dtype: 'float32',
    collective: plan.size === 1 ? 'local' : 'host',
    isa: 'auto',
    deviceIndex: 0,
    threads: 1,
    limits: { tokens: 4, rows: 4, sequences: 1, positions: 16, candidates: 1 },
    trace: false,
  });
  closing.push(engine);
  return engine;
}

describe('loading weights', () => {
  it.each([
    [0, 1],
    [1, 2],
    [3, 4],
  ])('brings rank %i of %i its own bytes and says how many are done', async (rank, size) => {
    const checkpoint = open(fixture('tiny-moe'));
    const plan = makePlan(checkpoint.config, rank, size);
    const engine = engineOf(plan);
    const progress: number[] = [];
    await loadWeights(engine, plan, { kind: 'checkpoint', checkpoint }, (bytes) => progress.push(bytes));
    await engine.prepare();
    expect(progress).toHaveLength(plan.tensors.length);
    expect(progress.at(-1)).toBe(weightBytes(plan));
    if (size === 1) expect(weightBytes(plan)).toBe(1_805_516); // total_size of its index
  });

  it.each<[string, (dir: string) => void]>([
    ['is cut off', (dir) => truncateSync(join(dir, 'model-00012-of-00012.safetensors'), 4096)],
    ['vanishes', (dir) => rmSync(join(dir, 'model-00012-of-00012.safetensors'))],
    ['is written over', (dir) => writeFileSync(join(dir, 'model-00012-of-00012.safetensors'), '')],
  ])('from a file that %s meanwhile is an error that says so', async (_, change) => {
    const dir = tempDir();
    cpSync(fixture('tiny-moe'), dir, { recursive: true });
    const checkpoint = open(dir);
    const plan = makePlan(checkpoint.config, 0, 1);
    const source: WeightSource = { kind: 'checkpoint', checkpoint };
    let first = true;
    const loading = loadWeights(engineOf(plan), plan, source, () => {
      if (first) change(dir);
      first = false;
    });
    await expect(loading).rejects.toThrow(expect.objectContaining({ code: 'TP_FILE_CHANGED', exitCode: 2 }));
    await expect(loading).rejects.toThrow(/model-00012-of-00012/);
  });

  it('from a seed gives the model that an export of the seed holds, to the bit', async () => {
    const dir = tempDir();
    const file = readConfigFile(DEFAULT_CONFIG_FILE);
    await exportCheckpoint(dir, file, { seed: 3 });
    const logits = async (source: WeightSource) => {
      const plan = makePlan(file.config, 0, 1);
      const engine = engineOf(plan);
      await loadWeights(engine, plan, source);
      await engine.prepare();
      engine.begin({
        tokens: Int32Array.of(2, 700, 31),
        positions: Int32Array.of(0, 1, 2),
        slots: new Int32Array(3),
        rows: Int32Array.of(2),
        targets: Int32Array.of(-1),
        temperature: new Float32Array(1),
        topK: new Int32Array(1),
        topP: Float32Array.of(1),
        seed: new Uint32Array(1),
        sequence: new Int32Array(1),
      });
      await engine.run(0);
      return engine.logits();
    };
    const fromSeed = await logits({ kind: 'synthetic', seed: 3, config: file.config });
    expect(fromSeed).toHaveLength(1024);
    expect(await logits({ kind: 'checkpoint', checkpoint: open(dir) })).toEqual(fromSeed);
    expect(await logits({ kind: 'synthetic', seed: 4, config: file.config })).not.toEqual(fromSeed);
  });
});
