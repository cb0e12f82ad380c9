// The comparison with Hugging Face transformers that a GPU host makes at the real width, here with a tiny checkpoint on the
// CPU: what that library computed with it lies in test/fixtures.

import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import { fixture, golden, root } from '../helpers/fixture.js';
import { readTensors } from '../helpers/tensors.js';

const script = (name: string) => import(pathToFileURL(join(root, 'test/gpu', name)).href);
const { besideTransformers } = await script('transformers.mjs');
const { compareExact, compareRounded, verdicts } = await script('parity.mjs');

describe.each(['tiny-moe', 'tiny-moe-hub'])('%s beside transformers', (name) => {
  const tensors = readTensors(fixture(`${name}/golden.safetensors`));
  const theirs = (tensor: string) =>
    tensor.endsWith('logits') ? tensors.float32(tensor) : tensors.int32(tensor);

  it('has its logits and routes in float32, and is no further from them in bfloat16', async () => {
    const result = await besideTransformers(fixture(name), golden(name).prompts, 'cpu', theirs);
    expect(result.exact.max_delta).toBeLessThan(1e-3);
    expect(result.exact.routes.differing).toBe(0);
    expect(result.exact.routes.compared).toBeGreaterThan(300);
    expect(result.rounded.ours.kl_mean).toBeGreaterThan(0);
    const lines = verdicts(result);
    console.log(lines.join('\n'));
    expect(lines.map((line: string) => line.split(' ')[0])).toEqual(['PASS', 'PASS']);
  });
});

describe('the verdict', () => {
  const logits = Float32Array.of(1, 2, 3, 4, 0, -1, 2, 0.5);
  const prompt = { logits, routes: Int32Array.of(3, 1, 0, 2) };
  const moved = (i: number, by: number) => logits.map((x, k) => (k === i ? x + by : x));

  it('in float32 does not care for the order of chosen experts, but for which they are', () => {
    const with_ = (routes: number[]) =>
      compareExact([{ ...prompt, routes: Int32Array.from(routes) }], [prompt], 2);
    expect(with_([1, 3, 2, 0])).toMatchObject({ equal: true, routes: { compared: 2, differing: 0 } });
    expect(with_([3, 0, 0, 2])).toMatchObject({ equal: false, routes: { compared: 2, differing: 1 } });
  });

  it.each([
    [0.004, true],
    [0.006, false],
    [Number.NaN, false],
  ])('in float32 of logits %d apart is %s', (by, equal) => {
    expect(compareExact([{ ...prompt, logits: moved(2, by) }], [prompt], 2).equal).toBe(equal);
  });

  it('in bfloat16 is against whoever is further from float32, beyond chance', () => {
    /** 64 rows whose second logit is off by about `by`. */
    const rows = 64;
    const exact = Float32Array.from({ length: 4 * rows }, (_, i) => logits[i % 4]!);
    const off = (by: number, salt: number) =>
      exact.map((x, i) => (i % 4 === 1 ? x + by * Math.sin(i * salt) : x));
    const [near, also, far] = [[off(0.1, 3)], [off(0.1, 5)], [off(0.3, 7)]];
    const compared = (ours: unknown, theirs: unknown) => compareRounded(ours, theirs, [exact], 4);
    expect(compared(near, far).no_further).toBe(true);
    expect(compared(near, also).no_further).toBe(true);
    expect(compared(also, near).no_further).toBe(true);
    expect(compared(far, near).no_further).toBe(false);
    expect(compared([off(Number.NaN, 1)], near).no_further).toBe(false);
    expect(compared(near, far).ours).toMatchObject({ rows, agreement: 1 });
  });

  it('is not given on logits of other lengths', () => {
    expect(() => compareRounded([logits.subarray(4)], [logits], [logits], 4)).toThrow(
      '4 of ours, 8 of theirs',
    );
  });
});
