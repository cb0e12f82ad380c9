import {
  copyFileSync,
  cpSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { basename, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { INDEX, openCheckpoint } from '../../src/model/checkpoint.js';
import type { JsonObject } from '../../src/model/json.js';
import { SafetensorsFile } from '../../src/model/safetensors.js';
import { tensorSplits } from '../../src/model/shard.js';
import { SafetensorsWriter } from '../../src/model/writer.js';
import { fixture } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';

const input = (code: string) => expect.objectContaining({ code, exitCode: 2 });

/** A copy of the text-only fixture to break. */
function copy(name = 'tiny-moe'): string {
  const dir = tempDir();
  cpSync(fixture(name), dir, { recursive: true });
  return dir;
}

function edit(dir: string, file: string, change: (json: JsonObject) => void): void {
  const json = JSON.parse(readFileSync(join(dir, file), 'utf8')) as JsonObject;
  change(json);
  writeFileSync(join(dir, file), JSON.stringify(json));
}

const weightMap = (json: JsonObject) => json.weight_map as Record<string, string>;

/** Writes a shard anew, with other names, shapes or dtypes. */
function rewrite(
  path: string,
  change: (t: { name: string; dtype: string; shape: readonly number[] }) => object,
): void {
  const old = new SafetensorsFile(path);
  const tensors = [...old.tensors].map(([name, { dtype, shape }]) => ({ name, dtype, shape }));
  const data = tensors.map(({ name }) => old.read(name));
  old.close();
  const changed = tensors.map((t) => ({ ...t, ...change(t) })) as typeof tensors;
  const writer = new SafetensorsWriter(path, changed as never);
  for (const bytes of data) writer.write(bytes);
  writer.finish();
}

describe('a checkpoint folder', () => {
  it.each(['tiny-moe', 'tiny-moe-hub'])('%s opens, with every text tensor in its place', (name) => {
    const checkpoint = openCheckpoint(fixture(name));
    for (const split of tensorSplits(checkpoint.config)) {
      const tensor = checkpoint.tensor(split.name);
      expect(tensor).toMatchObject({ shape: split.shape, dtype: 'BF16' });
      expect(tensor.fd).toBeGreaterThan(2);
    }
    expect(() => checkpoint.requireUnchanged()).not.toThrow();
    checkpoint.close();
  });

  it('of one file without an index opens', () => {
    const dir = tempDir();
    const whole = openCheckpoint(fixture('tiny-moe'));
    const splits = tensorSplits(whole.config);
    const stored = splits.map(
      ({ name, shape }) => ({ name: `model.${name}`, dtype: 'BF16', shape }) as const,
    );
    const writer = new SafetensorsWriter(join(dir, 'model.safetensors'), stored);
    for (const { shape } of splits) writer.write(new Uint8Array(shape.reduce((n, d) => n * d, 2)));
    writer.finish();
    copyFileSync(join(whole.dir, 'config.json'), join(dir, 'config.json'));
    const checkpoint = openCheckpoint(dir);
    expect(checkpoint.tensor('norm.weight').shape).toEqual([64]);
    checkpoint.close();
    whole.close();
  });

  it('of the Hugging Face cache opens through its links to blobs', () => {
    const cache = tempDir();
    const snapshot = join(cache, 'snapshots', 'abc');
    mkdirSync(snapshot, { recursive: true });
    mkdirSync(join(cache, 'blobs'));
    for (const file of readdirSync(fixture('tiny-moe'))) {
      copyFileSync(join(fixture('tiny-moe'), file), join(cache, 'blobs', `blob-of-${file}`));
      symlinkSync(join('..', '..', 'blobs', `blob-of-${file}`), join(snapshot, file));
    }
    expect(() => openCheckpoint(snapshot).close()).not.toThrow();
  });

  it('says which file changed or went away between opening and the end of reading', () => {
    const dir = copy();
    const checkpoint = openCheckpoint(dir);
    rmSync(join(dir, 'model-00003-of-00012.safetensors'));
    expect(() => checkpoint.requireUnchanged()).toThrow(input('TP_FILE_CHANGED'));
    expect(() => checkpoint.requireUnchanged()).toThrow(/model-00003-of-00012.safetensors .*removed/);
    checkpoint.close();
  });
});

const SHARD = 'model-00001-of-00012.safetensors';
const NORM = 'model.layers.0.input_layernorm.weight';

describe.each<[what: string, breakIt: (dir: string) => void, code: string, text: RegExp]>([
  ['no config', (dir) => rmSync(join(dir, 'config.json')), 'TP_FILE_UNREADABLE', /config.json/],
  [
    'no weights',
    (dir) => {
      for (const f of readdirSync(dir)) if (f.startsWith('model')) rmSync(join(dir, f));
    },
    'TP_CHECKPOINT',
    /neither/,
  ],
  ['an index that is no JSON', (dir) => writeFileSync(join(dir, INDEX), '{'), 'TP_JSON', /index/],
  ['an index without a map', (dir) => writeFileSync(join(dir, INDEX), '{}'), 'TP_CHECKPOINT', /weight_map/],
  [
    'an index that names a key twice',
    (dir) => writeFileSync(join(dir, INDEX), `{"weight_map":{"a":"${SHARD}","a":"${SHARD}"}}`),
    'TP_JSON',
    /twice/,
  ],
  [
    'a shard that is not there',
    (dir) => rmSync(join(dir, SHARD)),
    'TP_FILE_UNREADABLE',
    /00001-of-00012.*no such file/i,
  ],
  [
    'an extra shard',
    (dir) => copyFileSync(join(dir, SHARD), join(dir, 'model-00013-of-00012.safetensors')),
    'TP_CHECKPOINT',
    /00013-of-00012.safetensors is an extra shard/,
  ],
  [
    'a whole file beside the shards',
    (dir) => copyFileSync(join(dir, SHARD), join(dir, 'model.safetensors')),
    'TP_CHECKPOINT',
    /model.safetensors is an extra shard/,
  ],
  [
    'a shard in a folder below',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)[NORM] = `sub/${SHARD}`;
      }),
    'TP_CHECKPOINT',
    /"sub\/model-00001.* not a plain/,
  ],
  [
    'a shard in the folder above',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)[NORM] = `../${basename(dir)}/${SHARD}`;
      }),
    'TP_CHECKPOINT',
    /not a plain/,
  ],
  [
    'an absolute shard',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)[NORM] = join(dir, SHARD);
      }),
    'TP_CHECKPOINT',
    /not a plain/,
  ],
  [
    'a hidden shard',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)[NORM] = '..safetensors';
      }),
    'TP_CHECKPOINT',
    /not a plain/,
  ],
  [
    'a shard name with a zero byte',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)[NORM] = 'a\0.safetensors';
      }),
    'TP_CHECKPOINT',
    /not a plain/,
  ],
  [
    'a shard name that is a number',
    (dir) =>
      edit(dir, INDEX, (j) => {
        (j.weight_map as JsonObject)[NORM] = 1;
      }),
    'TP_CHECKPOINT',
    /not a plain/,
  ],
  [
    'a shard that links out of the folder',
    (dir) => {
      const away = join(tempDir(), SHARD);
      renameSync(join(dir, SHARD), away);
      symlinkSync(away, join(dir, SHARD));
    },
    'TP_CHECKPOINT',
    /leaves the folder/,
  ],
  [
    'a tensor that the index puts elsewhere',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)[NORM] = 'model-00002-of-00012.safetensors';
      }),
    'TP_CHECKPOINT',
    /input_layernorm.weight" into model-00002.*does not hold/,
  ],
  [
    'a tensor that only the index knows',
    (dir) =>
      edit(dir, INDEX, (j) => {
        weightMap(j)['model.x'] = SHARD;
      }),
    'TP_CHECKPOINT',
    /"model.x" into/,
  ],
  [
    'a tensor that the index does not know',
    (dir) =>
      edit(dir, INDEX, (j) => {
        delete weightMap(j)[NORM];
      }),
    'TP_CHECKPOINT',
    /input_layernorm.weight", which .* does not name/,
  ],
  [
    'a tensor in two shards',
    (dir) => {
      edit(dir, INDEX, (j) => {
        weightMap(j)['model.norm.weight'] = SHARD;
      });
      rewrite(join(dir, SHARD), (t) => (t.name === NORM ? { name: 'model.norm.weight' } : {}));
    },
    'TP_CHECKPOINT',
    /both model-0.* and model-0.* hold "model.norm.weight"/,
  ],
  [
    'a tensor missing',
    (dir) => {
      rewrite(join(dir, SHARD), (t) => (t.name === NORM ? { name: 'model.vision_tower.x' } : {}));
      edit(dir, INDEX, (j) => {
        delete weightMap(j)[NORM];
        weightMap(j)['model.vision_tower.x'] = SHARD;
      });
    },
    'TP_TENSOR_MISSING',
    /no tensor model.layers.0.input_layernorm.weight/,
  ],
  [
    'a tensor of another shape',
    (dir) => rewrite(join(dir, SHARD), (t) => (t.name === NORM ? { shape: [8, 8] } : {})),
    'TP_TENSOR_SHAPE',
    /model.layers.0.input_layernorm.weight must have shape \[64\] .* holds \[8, 8\]/,
  ],
  [
    'a tensor transposed',
    (dir) =>
      rewrite(join(dir, SHARD), (t) => (t.name === 'model.embed_tokens.weight' ? { shape: [64, 512] } : {})),
    'TP_TENSOR_SHAPE',
    /\[512, 64\].*\[64, 512\]/,
  ],
  [
    'weights that are not BF16',
    (dir) => rewrite(join(dir, SHARD), () => ({ dtype: 'F16' })),
    'TP_TENSOR_DTYPE',
    /is F16/,
  ],
  [
    'a config with fewer layers than the tensors',
    (dir) =>
      edit(dir, 'config.json', (j) => {
        j.num_hidden_layers = 5;
        j.layer_types = [
          'sliding_attention',
          'sliding_attention',
          'sliding_attention',
          'sliding_attention',
          'full_attention',
        ];
        j.per_layer_config = { 4: { head_dim: 32 } };
        j.attention_k_eq_v = false;
      }),
    'TP_TENSOR_UNEXPECTED',
    /model.layers.5/,
  ],
  [
    'a config with another width',
    (dir) =>
      edit(dir, 'config.json', (j) => {
        j.intermediate_size = 128;
      }),
    'TP_TENSOR_SHAPE',
    /gate_proj.weight must have shape \[128, 64\].*holds \[96, 64\]/,
  ],
  [
    'a config with another head',
    (dir) =>
      edit(dir, 'config.json', (j) => {
        j.head_dim = 16;
      }),
    'TP_TENSOR_SHAPE',
    /q_proj.weight must have shape \[64, 64\].*holds \[128, 64\]/,
  ],
  [
    'a v_proj for a layer that has none',
    (dir) =>
      edit(dir, 'config.json', (j) => {
        j.attention_k_eq_v = false;
      }),
    'TP_TENSOR_MISSING',
    /layers.5.self_attn.v_proj/,
  ],
  [
    'a bias',
    (dir) => {
      edit(dir, INDEX, (j) => {
        weightMap(j)['model.layers.0.self_attn.q_proj.bias'] = 'model-00013-of-00013.safetensors';
      });
      const w = new SafetensorsWriter(join(dir, 'model-00013-of-00013.safetensors'), [
        { name: 'model.layers.0.self_attn.q_proj.bias', dtype: 'BF16', shape: [1] },
      ]);
      w.write(new Uint8Array(2));
      w.finish();
    },
    'TP_TENSOR_UNEXPECTED',
    /q_proj.bias/,
  ],
  [
    'a shard that is cut off',
    (dir) => truncateSync(join(dir, SHARD), 100_000),
    'TP_SAFETENSORS',
    /end at byte/,
  ],
])('a checkpoint folder with %s', (_, breakIt, code, text) => {
  it('is refused', () => {
    const dir = copy();
    breakIt(dir);
    const before = readdirSync('/proc/self/fd').length;
    expect(() => openCheckpoint(dir)).toThrow(input(code));
    expect(() => openCheckpoint(dir)).toThrow(text);
    expect(readdirSync('/proc/self/fd').length).toBe(before);
  });
});
