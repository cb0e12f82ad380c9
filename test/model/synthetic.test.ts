import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { readConfigFile } from '../../src/model/configfile.js';
import { tensorSplits } from '../../src/model/shard.js';
import { type Scale, syntheticElement, syntheticKey, syntheticScale } from '../../src/model/synthetic.js';
import { native } from '../../src/native.js';
import { root } from '../helpers/fixture.js';

const configs = ['tiny', 'gemma-4-26b-a4b'].map(
  (name) => readConfigFile(`${root}/configs/${name}.json`).config,
);

/** Bits of a bfloat16 value. */
function bits(value: number): number {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, value);
  expect(view.getUint16(2)).toBe(0);
  return view.getUint16(0);
}

function nativeBits(start: number, count: number, key: [number, number], { scale, offset }: Scale): number[] {
  const out = new Uint16Array(count);
  native().synthesize(out, start, key, scale, offset);
  return [...out];
}

describe('synthetic elements', () => {
  const word = fc.integer({ min: 0, max: 2 ** 32 - 1 });
  const start = fc.oneof(
    fc.nat(1000),
    fc.integer({ min: 2 ** 32 - 40, max: 2 ** 33 }),
    fc.integer({ min: 2 ** 32, max: 2 ** 52 }),
  );
  const scale = fc.constantFrom(
    ...configs.flatMap((c) =>
      tensorSplits(c)
        .slice(0, 24)
        .map((t) => syntheticScale(t.name, c)),
    ),
  );

  it('are the same bits in the addon and in their definition, past 2^32 elements too', () => {
    fc.assert(
      fc.property(fc.tuple(word, word), start, scale, (key, from, s) => {
        const defined = Array.from({ length: 50 }, (_, i) => bits(syntheticElement(from + i, key, s)));
        expect(nativeBits(from, 50, key, s)).toEqual(defined);
      }),
      { numRuns: 300 },
    );
  });

  it('have the mean and the deviation that was asked for, and no lag', () => {
    const s = { scale: 2 ** -15, offset: 0.25 };
    const values = Array.from(
      { length: 100_000 },
      (_, i) => syntheticElement(i, syntheticKey(0, 'x'), s) - 0.25,
    );
    const mean = (list: number[]) => list.reduce((a, b) => a + b) / list.length;
    expect(mean(values)).toBeCloseTo(0, 2);
    expect(Math.sqrt(mean(values.map((v) => v * v)))).toBeCloseTo(32767 / Math.sqrt(3) / 2 ** 15, 2);
    for (const lag of [1, 2, 64, 4096])
      expect(mean(values.slice(lag).map((v, i) => v * values[i]!))).toBeCloseTo(0, 2);
  });

  it('of two tensors or two seeds have nothing in common', () => {
    const of = (seed: number, name: string) =>
      Array.from({ length: 1000 }, (_, i) =>
        syntheticElement(i, syntheticKey(seed, name), { scale: 1, offset: 0 }),
      );
    const one = of(0, 'layers.1.layer_scalar');
    for (const other of [of(1, 'layers.1.layer_scalar'), of(0, 'layers.11.layer_scalar')]) {
      const dot = one.reduce((sum, v, i) => sum + (v * other[i]!) / 32767 ** 2, 0) / one.length;
      expect(Math.abs(dot)).toBeLessThan(0.05);
    }
  });
});

describe('synthetic scales', () => {
  it('are bfloat16 values, so that the only rounding is the last one', () => {
    for (const config of configs)
      for (const { name } of tensorSplits(config)) {
        const { scale, offset } = syntheticScale(name, config);
        bits(scale);
        bits(offset);
        expect(scale).toBeGreaterThan(0);
      }
  });

  it('make a projection keep the size of what it is given', () => {
    const [config] = configs as [(typeof configs)[0]];
    for (const { name, shape } of tensorSplits(config).filter(
      (t) => /_proj|gate_up/.test(t.name) && !/router/.test(t.name),
    ))
      expect((syntheticScale(name, config).scale * 32767) / Math.sqrt(3)).toBeCloseTo(
        1 / Math.sqrt(shape.at(-1)!),
        3,
      );
  });
});
