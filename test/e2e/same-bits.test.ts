// Dumps of the command line, compared byte by byte: what may change in a run without changing a bit of its logits.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { SafetensorsFile } from '../../src/model/safetensors.js';
import { GenerateResult } from '../../src/report/schema.js';
import { fixture, golden } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';
import { tpRunJson } from '../helpers/tp-run.js';

/** A dump's tensors as bytes, by name. */
type Dump = Map<string, Buffer>;

async function dumpOf(args: readonly string[]): Promise<{ dump: Dump; stdout: unknown }> {
  const path = join(tempDir(), 'logits.safetensors');
  const stdout = await tpRunJson([...args, '--device', 'cpu', '--dump-logits', path]);
  const file = new SafetensorsFile(path);
  const dump = new Map([...file.tensors.keys()].map((name) => [name, file.read(name)]));
  file.close();
  return { dump, stdout };
}

function expectEqual(dump: Dump, base: Dump): void {
  expect([...dump.keys()]).toEqual([...base.keys()]);
  for (const [name, bytes] of dump) expect(bytes.equals(base.get(name)!), name).toBe(true);
}

const ids = (prompts: readonly number[][]) => prompts.flatMap((prompt) => ['--prompt-ids', prompt.join(',')]);
const decode = ['--max-tokens', '64', '--ignore-eos'];

describe.each(['tiny-moe', 'tiny-moe-hub'])('%s', (name) => {
  const { prompts } = golden(name);
  const model = ['--model', fixture(name)];
  const degrees = name === 'tiny-moe' ? [2, 4] : [2, 4, 8];

  it.each(['bfloat16', 'float32'])('gives the same logits at every TP degree in %s', async (dtype) => {
    const run = [...model, '--dtype', dtype, ...ids(prompts)];
    for (const words of [['score'], ['generate', ...decode]]) {
      const { dump: base } = await dumpOf([...words, ...run, '--gpus', '1']);
      for (const tp of degrees) {
        const { dump } = await dumpOf([...words, ...run, '--gpus', `${tp}`, '--threads', '1']);
        expectEqual(dump, base);
      }
    }
  });

  it('gives a prompt the same logits alone and at any place of a batch of 8', async () => {
    const run = ['generate', ...model, '--max-tokens', '16', '--ignore-eos', '--gpus', '1'];
    const [first] = prompts;
    const { dump: alone } = await dumpOf([...run, ...ids([first!])]);
    const others = Array.from({ length: 7 }, (_, i) =>
      prompts[(i % (prompts.length - 1)) + 1]!.slice(0, 3 + i),
    );
    for (const place of [0, 3, 7]) {
      const batch = [...others.slice(0, place), first!, ...others.slice(place)];
      const { dump } = await dumpOf([...run, '--batch', '8', ...ids(batch)]);
      expect(
        dump.get(`prompt.${place}.logits`)!.equals(alone.get('prompt.0.logits')!),
        `place ${place}`,
      ).toBe(true);
    }
  });

  it('gives a prompt the same logits processed at once and token by token', async () => {
    const run = ['score', ...model, ...ids(prompts), '--gpus', '2', '--threads', '1'];
    const { dump: chunks } = await dumpOf([...run, '--prefill-chunk', '64']);
    const { dump: single } = await dumpOf([...run, '--prefill-chunk', '1', '--batch', '1']);
    const { dump: odd } = await dumpOf([...run, '--prefill-chunk', '7', '--batch', '2']);
    expectEqual(single, chunks);
    expectEqual(odd, chunks);
  });

  it('generates the logits that scoring its own output gives', async () => {
    const run = [...model, '--gpus', '2', '--threads', '1'];
    const { dump: generated, stdout } = await dumpOf([
      'generate',
      ...run,
      ...ids(prompts),
      '--max-tokens',
      '12',
      '--ignore-eos',
    ]);
    const { results } = GenerateResult.parse(stdout);
    const { dump: scored } = await dumpOf([
      'score',
      ...run,
      ...ids(results.map((r) => [...r.prompt_ids, ...r.token_ids])),
    ]);
    for (const [i, { prompt_ids, token_ids }] of results.entries()) {
      const rows = generated.get(`prompt.${i}.logits`)!;
      const width = rows.length / token_ids.length;
      const from = (prompt_ids.length - 1) * width;
      const same = scored.get(`prompt.${i}.logits`)!.subarray(from, from + rows.length);
      expect(rows.equals(same), `prompt ${i}`).toBe(true);
    }
  });
});

it('gives the same bits in ten fresh runs', async () => {
  const { prompts } = golden('tiny-moe-hub');
  const path = () => join(tempDir(), 'logits.safetensors');
  const run = async () => {
    const file = path();
    const args = ['--model', fixture('tiny-moe-hub'), ...ids(prompts), '--max-tokens', '16', '--ignore-eos'];
    await tpRunJson([
      'generate',
      ...args,
      '--gpus',
      '2',
      '--threads',
      '1',
      '--device',
      'cpu',
      '--dump-logits',
      file,
    ]);
    return readFileSync(file);
  };
  const base = await run();
  for (let i = 1; i < 10; i++) expect((await run()).equals(base), `run ${i}`).toBe(true);
});
