// What a user may get wrong: each a coded message, exit code 2, no stack trace, nothing on stdout and nothing left on disk.

import { execFileSync } from 'node:child_process';
import {
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
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { native } from '../../src/native.js';
import { fixture, root } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';
import { tpRun } from '../helpers/tp-run.js';

// biome-ignore lint/suspicious/noExplicitAny: parsed JSON that a test reaches into
type Json = any;

/** Runs with a temporary folder of its own, which must be empty afterwards; the line with the code. */
async function refusal(args: readonly string[], env: Record<string, string> = {}): Promise<string> {
  const folder = tempDir();
  const { code, stdout, stderr } = await tpRun(args, { TMPDIR: folder, ...env });
  expect(stderr).not.toMatch(/^\s+at /m);
  const lines = stderr.split('\n').filter((line) => line.startsWith('TP_'));
  expect(lines, stderr).toHaveLength(1);
  expect(stdout).toBe('');
  expect(code, stderr).toBe(2);
  expect(readdirSync(folder)).toEqual([]);
  return lines[0]!;
}

const cpu = ['--device', 'cpu'];
const tiny = [...cpu, '--model', fixture('tiny-moe')];

describe('the command line', () => {
  it.each([
    ['an unknown command', ['serve'], 'TP_COMMAND'],
    ['an unknown flag', ['--gpu', '2'], 'TP_FLAG_UNKNOWN'],
    ['a flag of another command', ['score', '--max-tokens', '2'], 'TP_FLAG_UNKNOWN'],
    ['a value that is no number', ['--max-tokens', 'many'], 'TP_FLAG_VALUE'],
    ['ranks that heads cannot be split over', [...tiny, '--gpus', '3'], 'TP_SHARD_UNEVEN'],
    ['more ranks than virtual shards', [...tiny, '--gpus', '8'], 'TP_SHARD_UNEVEN'],
    ['CUDA where there is none', ['--device', 'cuda'], 'TP_DEVICE'],
    [
      'a collective that needs GPUs',
      [...cpu, '--gpus', '2', '--collective', 'nccl'],
      'TP_COLLECTIVE_UNSUPPORTED',
    ],
    ['more context than the model has', [...tiny, '--max-model-len', '5000'], 'TP_FLAG_VALUE'],
  ])('refuses %s', async (_, args, code) => {
    expect(await refusal(args)).toMatch(new RegExp(`^${code}: `));
  });

  it('refuses CPU instructions that this machine lacks', async (test) => {
    const avx512 = (native().version().isa as string[]).includes('avx512');
    test.skip(avx512, 'this CPU has them all');
    expect(await refusal([...tiny, '--isa', 'avx512'])).toMatch(/^TP_FLAG_VALUE: .* for --isa .* avx512/);
  });

  it('refuses a variable with a bad value and a misspelt one', async () => {
    expect(await refusal(cpu, { TP_RUN_GPUS: 'two' })).toMatch(/^TP_FLAG_VALUE: .* for TP_RUN_GPUS .*"two"/);
    expect(await refusal(cpu, { TP_RUN_GPU: '2' })).toMatch(/^TP_VARIABLE_UNKNOWN: TP_RUN_GPU /);
  });
});

describe('prompts', () => {
  it.each([
    ['a token id above the vocabulary', ['--prompt-ids', '2,512'], /^TP_PROMPT_TOKEN: .* 512; .* 0 to 511/],
    ['a negative token id', ['--prompt-ids', '-1,2'], /^TP_PROMPT_TOKEN: .* "-1"/],
    ['a token id that is no whole number', ['--prompt-ids', '2,1.5'], /^TP_PROMPT_TOKEN: .* "1.5"/],
    ['a token id that is no number', ['--prompt-ids', '2,x'], /^TP_PROMPT_TOKEN: .* "x"/],
    ['a gap between commas', ['--prompt-ids', '2,,5'], /^TP_PROMPT_TOKEN: .* ""/],
    ['no token ids', ['--prompt-ids', ''], /^TP_PROMPT_EMPTY: /],
    ['an empty text', ['--prompt', ''], /^TP_PROMPT_EMPTY: /],
    ['a text without a tokenizer', ['--prompt', 'hello'], /^TP_TOKENIZER_MISSING: /],
    [
      'a prompt and new tokens beyond the context',
      ['--prompt-ids', '2,5', '--max-tokens', '4095'],
      /^TP_PROMPT_LENGTH: .* 2 tokens and 4095 more .* 4096/,
    ],
    [
      'more than the flag allows',
      ['--prompt-ids', '2,5', '--max-model-len', '9', '--max-tokens', '8'],
      /^TP_PROMPT_LENGTH: .* 9 \(of --max-model-len\)/,
    ],
    ['a prompts file that is not there', ['--prompts', '/nowhere.jsonl'], /^TP_FILE_UNREADABLE: /],
  ])('refuses %s', async (_, args, message) => {
    expect(await refusal([...tiny, ...args])).toMatch(message);
  });

  it.each([
    ['', /holds no prompt/],
    ['{"prompt_ids":[2]}\nnot json\n', /line 2: /],
    ['{"prompts":"hello"}\n', /line 1 holds neither or both/],
    ['{"prompt":"a","prompt_ids":[2]}\n', /line 1 holds neither or both/],
    ['{"prompt_ids":[2.5]}\n', /^TP_PROMPT_TOKEN: .* 2.5/],
    ['{"prompt_ids":[]}\n', /^TP_PROMPT_EMPTY: /],
  ])('refuses a prompts file that holds %j', async (text, message) => {
    const file = join(tempDir(), 'prompts.jsonl');
    writeFileSync(file, text);
    expect(await refusal([...tiny, '--prompts', file])).toMatch(message);
  });
});

describe('models', () => {
  /** A copy of the golden checkpoint that `spoil` may change. */
  function spoilt(spoil: (dir: string) => void): string {
    const dir = join(tempDir(), 'model');
    mkdirSync(dir);
    for (const name of readdirSync(fixture('tiny-moe'))) {
      if (/^(config|generation_config|model).*\.(json|safetensors)$/.test(name)) {
        cpSync(join(fixture('tiny-moe'), name), join(dir, name));
      }
    }
    spoil(dir);
    return dir;
  }
  function edit(path: string, change: (json: Json) => void): void {
    const json = JSON.parse(readFileSync(path, 'utf8'));
    change(json);
    writeFileSync(path, JSON.stringify(json));
  }
  const index = 'model.safetensors.index.json';
  const shard = 'model-00003-of-00012.safetensors';

  it('reads a copy that nobody spoilt', async () => {
    const { code } = await tpRun([
      ...cpu,
      '--model',
      spoilt(() => {}),
      '--max-tokens',
      '1',
      '--prompt-ids',
      '2',
    ]);
    expect(code).toBe(0);
  });

  it.each<[string, (dir: string) => void, RegExp]>([
    [
      'a config that contradicts the shapes',
      (d) => edit(join(d, 'config.json'), (c) => (c.hidden_size = 128)),
      /^TP_TENSOR_SHAPE: /,
    ],
    ['a config that is no JSON', (d) => writeFileSync(join(d, 'config.json'), '{'), /^TP_JSON: /],
    [
      'a config with a feature we lack',
      (d) => edit(join(d, 'config.json'), (c) => (c.num_kv_shared_layers = 2)),
      /^TP_CONFIG_UNSUPPORTED: .*num_kv_shared_layers/,
    ],
    ['no config', (d) => rmSync(join(d, 'config.json')), /^TP_FILE_UNREADABLE: /],
    ['a shard that is not there', (d) => rmSync(join(d, shard)), /^TP_(FILE_UNREADABLE|CHECKPOINT): .*00003/],
    ['a shard that ends too early', (d) => truncateSync(join(d, shard), 5000), /^TP_SAFETENSORS: .*00003/],
    [
      'a shard that the index does not know',
      (d) =>
        edit(join(d, index), (i) => {
          for (const [k, v] of Object.entries(i.weight_map)) if (v === shard) delete i.weight_map[k];
        }),
      /^TP_/,
    ],
    [
      'a tensor that is nowhere',
      (d) =>
        edit(join(d, index), (i) => {
          delete i.weight_map['model.norm.weight'];
        }),
      /^TP_/,
    ],
    [
      'an index that names a path outside',
      (d) =>
        edit(join(d, index), (i) => {
          i.weight_map['model.norm.weight'] = '../model.safetensors';
        }),
      /^TP_CHECKPOINT: /,
    ],
    [
      'a shard that is a link to the outside',
      (d) => {
        const outside = join(d, '..', 'outside');
        renameSync(join(d, shard), outside);
        symlinkSync(outside, join(d, shard));
      },
      /^TP_CHECKPOINT: /,
    ],
  ])('refuses %s', async (_, spoil, message) => {
    const dir = spoilt(spoil);
    const args = [...cpu, '--model', dir, '--max-tokens', '1', '--prompt-ids', '2'];
    expect(await refusal(args)).toMatch(message);
  });

  it('refuses a model that is not there', async () => {
    expect(await refusal([...cpu, '--model', '/nowhere'])).toMatch(/^TP_FILE_UNREADABLE: \/nowhere /);
  });

  it.each<[string, (json: Json) => void, RegExp]>([
    ['an unknown key', (json) => (json.sedd = 1), /^TP_CONFIG_KEY: .*sedd/],
    ['an unknown key of the shape', (json) => (json.config.hiden_size = 1), /^TP_CONFIG_KEY: .*hiden_size/],
    ['an unknown option', (json) => (json.options['max-token'] = 1), /^TP_CONFIG_KEY: .*max-token/],
    ['an option with a bad value', (json) => (json.options.gpus = 0), /^TP_CONFIG_VALUE: .*gpus/],
    ['an option that the flag refuses', (json) => (json.options.gpus = 1000), /^TP_FLAG_VALUE: .*gpus/],
    [
      'a preset prompt beyond the vocabulary',
      (json) => (json.options['prompt-ids'] = [[2, 5000]]),
      /^TP_PROMPT_TOKEN: .*5000/,
    ],
  ])('refuses a config file with %s', async (_, change, message) => {
    const file = join(tempDir(), 'config.json');
    cpSync(join(root, 'configs/tiny.json'), file);
    edit(file, change);
    expect(await refusal([...cpu, '--model', file])).toMatch(message);
  });
});

describe('places', () => {
  it.each(['/proc/logits.safetensors', '/dev/full', '/nowhere/logits.safetensors', '/'])(
    'refuses to dump logits to %s',
    async (place) => {
      expect(await refusal([...tiny, '--dump-logits', place])).toMatch(/^TP_FILE_UNWRITABLE: /);
    },
  );

  it('refuses a dump that the free room cannot hold, before anything runs', async () => {
    const disk = tempDir();
    try {
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', disk], { stdio: 'ignore' });
    } catch {
      console.log('skipped: a small file system cannot be mounted here');
      return;
    }
    try {
      const args = [
        ...tiny,
        '--prompt-ids',
        '2',
        '--max-tokens',
        '1000',
        '--dump-logits',
        join(disk, 'a.safetensors'),
      ];
      expect(await refusal(args)).toMatch(/^TP_FILE_UNWRITABLE: .* 3 MB are needed and 1 MB are free/);
      writeFileSync(join(disk, 'filler'), Buffer.alloc(256 * 1024 - 4096));
      execFileSync('sh', ['-c', `cat /dev/zero > ${join(disk, 'rest')} 2>/dev/null || true`]);
      const full = [
        ...tiny,
        '--prompt-ids',
        '2',
        '--max-tokens',
        '1',
        '--dump-logits',
        join(disk, 'b.safetensors'),
      ];
      expect(await refusal(full)).toMatch(/^TP_FILE_UNWRITABLE: .*(ENOSPC|free)/);
      expect(readdirSync(disk).sort()).toEqual(['filler', 'rest']);
    } finally {
      execFileSync('umount', [disk]);
    }
  });

  it.each(['/proc/logs', '/etc/passwd', '/etc/passwd/logs', '/proc'])(
    'refuses to keep logs in %s',
    async (place) => {
      expect(await refusal([...tiny, '--log-dir', place])).toMatch(/^TP_LOG_DIR: /);
    },
  );

  it('refuses a temporary folder in which no socket can be bound', async () => {
    expect(await refusal([...tiny, '--gpus', '2'], { TMPDIR: '/nowhere' })).toMatch(/^TP_BIND: .*TMPDIR/);
    const long = join(tempDir(), 'x'.repeat(100));
    mkdirSync(long);
    expect(await refusal([...tiny, '--gpus', '2'], { TMPDIR: long })).toMatch(/^TP_BIND: .*longer than/);
  });

  it.each(['check', 'bench decode', 'bench allreduce', 'bench moe'])(
    'refuses a result file of %s that cannot be written',
    async (command) => {
      const device = command === 'bench moe' ? [] : cpu;
      const args = [...command.split(' '), ...device, '--out', '/proc/result.json'];
      expect(await refusal(args)).toMatch(/^TP_FILE_UNWRITABLE: \/proc\/result.json /);
    },
  );

  it('refuses to export a checkpoint, and to export into a folder that is not empty', async () => {
    expect(await refusal(['export', tempDir(), '--model', fixture('tiny-moe')])).toMatch(/^TP_FLAG_VALUE: /);
    expect(await refusal(['export', root])).toMatch(/^TP_EXPORT_FOLDER: /);
    expect(await refusal(['export', '/proc/model'])).toMatch(/^TP_FILE_UNWRITABLE: /);
  });
});
