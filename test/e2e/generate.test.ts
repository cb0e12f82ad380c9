import { spawn } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { GenerateResult } from '../../src/report/schema.js';
import { fixture, root } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';
import { readTensors } from '../helpers/tensors.js';
import { tpRun, tpRunJson } from '../helpers/tp-run.js';

const hub = ['--model', fixture('tiny-moe-hub'), '--device', 'cpu'];
const tiny = ['--model', fixture('tiny-moe'), '--device', 'cpu'];

describe('tp-run without a command', () => {
  it('says in one line that CPU workers stand in for GPUs, prints ids alone on stdout, and sums up', async () => {
    const { code, stdout, stderr } = await tpRun(['--gpus', '2', '--max-tokens', '12', '--ignore-eos']);
    expect(code).toBe(0);
    expect(stdout).toMatch(/^\d+( \d+){11}\n$/);
    expect(stderr.split('\n').filter((line) => /no usable GPU.*2 CPU workers/.test(line))).toHaveLength(1);
    expect(stderr).toMatch(/^12 tokens: .*TPOT median [\d.]+ ms, p90 [\d.]+ ms$/m);
    expect(stderr).toMatch(/^per token: compute .* ms \(\d+.*%\), sync .*%\), host .*%\)$/m);
    expect(stderr).toMatch(/^tp=2 cpu bfloat16, collective zmq \(peer off: .*; nccl off: .*\)$/m);
  });

  it('takes its defaults from variables and lets flags win', async () => {
    const env = {
      TP_RUN_MAX_TOKENS: '3',
      TP_RUN_JSON: 'true',
      TP_RUN_DTYPE: 'float32',
      TP_RUN_IGNORE_EOS: 'true',
    };
    const { code, stdout } = await tpRun(['--device', 'cpu', '--max-tokens', '5'], env);
    expect(code).toBe(0);
    const result = GenerateResult.parse(JSON.parse(stdout));
    expect(result.run.dtype).toBe('float32');
    expect(result.results[0]!.token_ids).toHaveLength(5);
  });
});

describe('generate', () => {
  it('streams the text of several prompts in their order', async () => {
    const words = ['--prompt', 'Hello', '--prompt-ids', '2,17,5', '--max-tokens', '6', '--ignore-eos'];
    const [{ stdout }, { results }] = [
      await tpRun([...hub, ...words]),
      GenerateResult.parse(await tpRunJson([...hub, ...words])),
    ];
    expect(results.map(({ text }) => typeof text)).toEqual(['string', 'string']);
    expect(stdout).toBe(results.map(({ text }, i) => `[${i}] ${text}\n`).join(''));
  });

  it('gives no text where there is no tokenizer', async () => {
    const result = GenerateResult.parse(
      await tpRunJson([...tiny, '--prompt-ids', '2,5', '--max-tokens', '2']),
    );
    expect(result.results[0]!.text).toBeNull();
  });

  it('reads prompts of a JSONL file after those of the command line', async () => {
    const file = join(tempDir(), 'prompts.jsonl');
    writeFileSync(file, '{"prompt_ids":[2,7],"id":1}\n\n{"prompt":"Hello"}\n');
    const result = GenerateResult.parse(
      await tpRunJson([
        ...hub,
        '--prompts',
        file,
        '--prompt-ids',
        '2,9',
        '--max-tokens',
        '2',
        '--ignore-eos',
      ]),
    );
    expect(result.results.map(({ prompt_ids }) => prompt_ids)).toEqual([
      [2, 9],
      [2, 7],
      [2, expect.any(Number)],
    ]);
  });

  it('puts a text prompt into the chat template on request', async () => {
    const ask = async (...more: string[]) => {
      const words = ['--prompt', 'Hello', '--max-tokens', '1', ...more];
      return GenerateResult.parse(await tpRunJson([...hub, ...words])).results[0]!.prompt_ids;
    };
    const [plain, chat] = [await ask(), await ask('--chat')];
    expect(chat.length).toBeGreaterThan(plain.length);
    expect(chat[0]).toBe(2);
    expect(chat.filter((id) => id === 2)).toHaveLength(1);
  });

  it('stops at an end token unless told to go on', async () => {
    const words = [...tiny, ...'--max-tokens 60 --temperature 6 --seed 2 --prompt-ids 2,5,7'.split(' ')];
    const [stopped, longer] = [
      GenerateResult.parse(await tpRunJson(words)),
      GenerateResult.parse(await tpRunJson([...words, '--ignore-eos'])),
    ];
    const { token_ids, finish_reason } = stopped.results[0]!;
    expect(finish_reason).toBe('stop');
    expect(token_ids.at(-1)).toBe(1);
    expect(token_ids.length).toBeLessThan(60);
    expect(longer.results[0]).toMatchObject({ finish_reason: 'length' });
    expect(longer.results[0]!.token_ids).toHaveLength(60);
    expect(longer.results[0]!.token_ids.slice(0, token_ids.length)).toEqual(token_ids);
  });

  it('draws the same tokens from the same seed at any TP degree, and others from another seed', async () => {
    const draw = async (seed: string, gpus: string, ...more: string[]) => {
      const words = [
        '--temperature',
        '1.5',
        '--seed',
        seed,
        '--gpus',
        gpus,
        '--max-tokens',
        '24',
        '--ignore-eos',
      ];
      const result = GenerateResult.parse(
        await tpRunJson([...tiny, '--prompt-ids', '2,5', ...words, ...more]),
      );
      return result.results[0]!.token_ids;
    };
    for (const filter of [[], ['--top-k', '20'], ['--top-p', '0.8'], ['--top-k', '20', '--top-p', '0.8']]) {
      expect(await draw('1', '2', ...filter)).toEqual(await draw('1', '1', ...filter));
    }
    expect(await draw('2', '1')).not.toEqual(await draw('1', '1'));
  });

  it('dumps one row of logits for every token it generated, also when a sequence stops early', async () => {
    const dump = join(tempDir(), 'logits.safetensors');
    const words = ['--max-tokens', '60', '--temperature', '6', '--seed', '2', '--dump-logits', dump];
    const prompts = ['--prompt-ids', '2,5,7', '--prompt-ids', '2,9'];
    const { results } = GenerateResult.parse(await tpRunJson([...tiny, ...prompts, ...words]));
    expect(results.map(({ finish_reason }) => finish_reason)).toEqual(['stop', 'length']);
    const tensors = readTensors(dump);
    for (const [i, { token_ids }] of results.entries()) {
      expect(tensors.shape(`prompt.${i}.logits`)).toEqual([token_ids.length, 512]);
    }
    tensors.close();
  });

  it('decodes more prompts than fit into a batch', async () => {
    const prompts = Array.from({ length: 5 }, (_, i) => ['--prompt-ids', `2,${i + 3},7`]).flat();
    const words = ['--max-tokens', '4', '--ignore-eos'];
    const [narrow, wide] = [
      GenerateResult.parse(await tpRunJson([...tiny, ...prompts, ...words, '--batch', '2'])),
      GenerateResult.parse(await tpRunJson([...tiny, ...prompts, ...words, '--batch', '5'])),
    ];
    expect(narrow.results).toEqual(wide.results);
    expect(narrow.run.sequences).toBe(2);
  });

  it('ends quietly and leaves nothing behind when its reader goes away', async () => {
    const folder = tempDir();
    const args = [
      'dist/cli/main.js',
      '--device',
      'cpu',
      '--gpus',
      '2',
      '--max-tokens',
      '3000',
      '--ignore-eos',
    ];
    const child = spawn(process.execPath, args, {
      cwd: root,
      env: { ...process.env, TMPDIR: folder },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let stderr = '';
    child.stderr.on('data', (data) => {
      stderr += data;
    });
    child.stdout.once('data', () => child.stdout.destroy());
    const code = await new Promise((resolve) => child.once('close', resolve));
    expect(code).toBe(0);
    expect(stderr).not.toMatch(/TP_|EPIPE|at /);
    expect(readdirSync(folder)).toEqual([]);
  });

  it('keeps a log file for each rank', async () => {
    const folder = join(tempDir(), 'a', 'b');
    const { code } = await tpRun([...tiny, '--gpus', '2', '--max-tokens', '2', '--log-dir', folder]);
    expect(code).toBe(0);
    expect(readdirSync(folder).sort()).toEqual(['rank-0.log', 'rank-1.log']);
    expect(readFileSync(join(folder, 'rank-0.log'), 'utf8')).not.toMatch(/TP_/);
  });
});
