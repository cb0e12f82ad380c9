import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../src/model/checkpoint.js';
import { DEFAULT_CONFIG_FILE, readConfigFile } from '../../src/model/configfile.js';
import { exportCheckpoint } from '../../src/model/export.js';
import { SafetensorsFile } from '../../src/model/safetensors.js';
import { tensorSplits } from '../../src/model/shard.js';
import { syntheticElement, syntheticKey, syntheticScale } from '../../src/model/synthetic.js';
import { tempDir } from '../helpers/tempdir.js';

const tiny = readConfigFile(DEFAULT_CONFIG_FILE);
const json = (dir: string, name: string) => JSON.parse(readFileSync(join(dir, name), 'utf8'));

describe('an exported checkpoint', () => {
  it('opens as the model it came from, element by element', async () => {
    const dir = tempDir();
    const progress: number[] = [];
    await exportCheckpoint(dir, tiny, {
      seed: 5,
      onProgress: (bytes, total) => progress.push(bytes / total),
    });
    expect(progress.at(-1)).toBe(1);
    expect(progress).toEqual([...progress].sort((a, b) => a - b));

    const checkpoint = openCheckpoint(dir);
    expect(checkpoint.config).toEqual(tiny.config);
    checkpoint.close();
    const shard = new SafetensorsFile(join(dir, 'model-00001-of-00001.safetensors'));
    for (const { name } of tensorSplits(tiny.config)) {
      const bytes = shard.read(`model.${name}`);
      const key = syntheticKey(5, name);
      for (let i = 0; i < bytes.length / 2; i += 1 + Math.floor(bytes.length / 200)) {
        const value = syntheticElement(i, key, syntheticScale(name, tiny.config));
        const stored = new Float32Array(new Uint32Array([bytes.readUInt16LE(2 * i) << 16]).buffer)[0];
        expect(stored, `${name} ${i}`).toBe(value);
      }
    }
    shard.close();
  });

  it('is cut into shards that the index lists, none above the limit', async () => {
    const dir = tempDir();
    await exportCheckpoint(dir, tiny, { maxShardBytes: 600_000 });
    const index = json(dir, 'model.safetensors.index.json');
    const shards = readdirSync(dir).filter((name) => name.endsWith('.safetensors'));
    expect(shards.length).toBeGreaterThan(2);
    expect([...new Set(Object.values(index.weight_map))].sort()).toEqual(shards.sort());
    let bytes = 0;
    for (const name of shards) {
      const shard = new SafetensorsFile(join(dir, name));
      const sizes = [...shard.tensors.values()].map((t) => t.bytes);
      expect(sizes.reduce((a, b) => a + b)).toBeLessThanOrEqual(Math.max(600_000, ...sizes));
      bytes += sizes.reduce((a, b) => a + b);
      shard.close();
    }
    expect(index.metadata.total_size).toBe(bytes);
    openCheckpoint(dir).close();
  });

  it('writes floats as floats, and stop tokens for generation', async () => {
    const dir = tempDir();
    await exportCheckpoint(dir, tiny);
    expect(readFileSync(join(dir, 'config.json'), 'utf8')).toContain('"final_logit_softcapping": 30.0,');
    expect(json(dir, 'generation_config.json')).toEqual({
      bos_token_id: 2,
      eos_token_id: [1],
      pad_token_id: 0,
    });
  });

  it('does not go into a folder that holds something', async () => {
    const dir = tempDir();
    writeFileSync(join(dir, 'notes.txt'), '');
    await expect(exportCheckpoint(dir, tiny)).rejects.toThrow(
      expect.objectContaining({ code: 'TP_EXPORT_FOLDER', exitCode: 2 }),
    );
    expect(readdirSync(dir)).toEqual(['notes.txt']);
  });

  it('that fails in the middle leaves no file', async () => {
    const dir = tempDir();
    let calls = 0;
    const synthesize = () => {
      if (++calls === 40) throw new Error('stop');
    };
    await expect(exportCheckpoint(dir, tiny, { maxShardBytes: 600_000, synthesize })).rejects.toThrow('stop');
    expect(calls).toBe(40);
    expect(readdirSync(dir)).toEqual([]);
  });

  it.each(['/proc/x', '/dev/null/x'])('cannot go to %s', async (dir) => {
    await expect(exportCheckpoint(dir, tiny)).rejects.toThrow(
      expect.objectContaining({ code: 'TP_FILE_UNWRITABLE', exitCode: 2 }),
    );
  });
});
