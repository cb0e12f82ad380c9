import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { CheckResult } from '../../src/report/schema.js';
import { fixture } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';
import { tpRun } from '../helpers/tp-run.js';

const small = ['check', '--device', 'cpu', '--threads', '1', '--repeats', '1'];
const short = ['--prompt-ids', '2,5,7', '--prompt-ids', '2,9', '--max-tokens', '3'];

async function check(...args: string[]): Promise<{ code: number | null; result: CheckResult }> {
  const { code, stdout, stderr } = await tpRun([...small, ...args, '--json']);
  if (!stdout) throw new Error(stderr);
  return { code, result: CheckResult.parse(JSON.parse(stdout)) };
}

describe('check', () => {
  it.each(['2', '4'])('proves that %s ranks give the bits of one, with its verdict first', async (gpus) => {
    const { code, stdout } = await tpRun([...small, '--gpus', gpus, '--max-tokens', '16']);
    expect(stdout.split('\n')[0]).toMatch(
      new RegExp(
        `^PASS tp=${gpus} is bit-identical to tp=1: 8 prompts x 16 tokens, 128 logit rows, 131 072 values, 0 differing ` +
          '\\[control: detected at layer 3 attention\\]$',
      ),
    );
    expect(stdout).toMatch(/^tp +tp=\d against tp=1 .* equal$/m);
    expect(stdout).toMatch(/^batch +each prompt alone .* equal$/m);
    expect(stdout).toMatch(/^batch +other places .* equal$/m);
    expect(stdout).toMatch(/^repeat +fresh run 1 .* equal$/m);
    expect(stdout).toMatch(/^control +one ULP at .* layer 3 attention +found there$/m);
    expect(code).toBe(0);
  });

  it.each(['tiny-moe', 'tiny-moe-hub'])('passes on the checkpoint %s in float32', async (name) => {
    const { code, result } = await check(
      '--gpus',
      '2',
      '--model',
      fixture(name),
      '--dtype',
      'float32',
      ...short,
    );
    expect(result).toMatchObject({ verdict: 'pass', control: { detected: true } });
    expect(code).toBe(0);
  });

  it('checks batch and repetition of a single rank', async () => {
    const { code, result } = await check(...short);
    expect(result.axes.map(({ axis }) => axis)).toEqual(['batch', 'batch', 'repeat']);
    expect(result.line).toMatch(
      /^PASS tp=1 is bit-identical to itself over batch and repetition: 2 prompts x 3 tokens/,
    );
    expect(code).toBe(0);
  });

  it.each(['qkv', 'attention', 'attnOut', 'route', 'gateUp', 'down', 'ffnOut'])(
    'names a fault planted in %s of layer 2, exit code 1',
    async (stage) => {
      const { code, result } = await check(
        '--gpus',
        '2',
        ...short,
        '--plant-fault',
        `layer=2,stage=${stage}`,
      );
      const [tp, ...others] = result.axes;
      expect(result.verdict).toBe('fail');
      expect(tp).toMatchObject({
        axis: 'tp',
        equal: false,
        first: { sequence: 1, position: 1, layer: 2, stage },
      });
      expect(result.line).toMatch(
        new RegExp(
          `^FAIL tp=2 differs from tp=1 in 1/2 prompts; first at sequence 1, position 1, layer 2 ${stage}$`,
        ),
      );
      expect(others.every(({ equal }) => equal)).toBe(true);
      expect(code).toBe(1);
    },
  );

  it('names a fault on a chosen rank', async () => {
    const place = 'layer=5,stage=gateUp,rank=0';
    const { code, result } = await check('--gpus', '2', ...short, '--plant-fault', place);
    expect(result.axes[0]!.first).toMatchObject({ layer: 5, stage: 'gateUp' });
    expect(code).toBe(1);
  });

  it('says where ranks disagree when one of them alone computes what all must hold', async () => {
    const place = 'layer=2,stage=ffnOut,rank=1';
    const { code, result } = await check('--gpus', '2', ...short, '--plant-fault', place);
    expect(result.line).toMatch(/^FAIL tp=2 against tp=1: .*ffnOut in layer 2/);
    expect(code).toBe(1);
  });

  it('looks at tokens alone when told to, and still runs its control', async () => {
    const { code, result } = await check('--gpus', '2', ...short, '--level', 'tokens');
    expect(result.axes[0]!.compared).toEqual({ tokens: 6, rows: 0, values: 0, outputs: 0 });
    expect(result.control!.detected).toBe(true);
    expect(code).toBe(0);
  });

  it('writes its result to a file', async () => {
    const out = join(tempDir(), 'check.json');
    const { code } = await tpRun([...small, ...short, '--out', out]);
    expect(code).toBe(0);
    expect(CheckResult.parse(JSON.parse(readFileSync(out, 'utf8'))).verdict).toBe('pass');
  });

  it.each([
    ['layer=6,stage=attention', '0 to 5'],
    ['layer=0,stage=logits', 'qkv, attention'],
    ['layer=0,stage=attention,rank=2', '0 to 1'],
  ])('refuses to plant a fault at %s', async (place, legal) => {
    const { code, stdout, stderr } = await tpRun([...small, '--gpus', '2', '--plant-fault', place]);
    expect(stderr).toMatch(/^TP_FAULT_PLACE: /m);
    expect(stderr).toContain(legal);
    expect(stdout).toBe('');
    expect(code).toBe(2);
  });
});
